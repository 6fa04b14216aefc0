"""``python -m chaos --seed 7 --faults 1000``: break a server while clients use it; exit 1 when anything was wrong."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from chaos import clock, room
from chaos.faults import NEED_CLOCK, NEED_ROOM
from chaos.run import CALLERS, RANKS, run
from chaos.schedule import quick, schedule


def main() -> int:
    """Parse, run, tell."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="repeats the schedule of an earlier run")
    parser.add_argument("--faults", type=int, default=1000, help="how many; default 1000")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with fault N of the schedule")
    parser.add_argument("--minutes", type=float, default=60, help="begin no fault after so many minutes; default 60")
    parser.add_argument("--callers", type=int, default=CALLERS, help=f"clients at a time; default {CALLERS}")
    parser.add_argument("--quick", action="store_true", help="every kind of fault once, within a minute or so")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    if room.available() and not room.inside():
        if "--seed" not in sys.argv:
            sys.argv += ["--seed", str(args.seed)]
        room.enter()
    without: set[str] = set()
    if not room.inside():
        without |= _left_out("a mount namespace (unshare)", NEED_ROOM)
    if not clock.available():
        without |= _left_out("a C compiler (cc)", NEED_CLOCK)
    if without and os.environ.get("CI"):
        print("in CI nothing may be left out")
        return 2
    whole = schedule(args.seed, args.faults, RANKS, without)[args.first :]
    faults = quick(args.seed, RANKS, without) if args.quick else whole
    print(f"seed {args.seed}, {len(faults)} faults", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # whoever stops the driver does not leave its server behind
    with tempfile.TemporaryDirectory(prefix="drumline-chaos-") as folder:
        report = asyncio.run(run(args.seed, faults, args.callers, Path(folder), 60 * args.minutes))
    print(report.text())
    if args.save is not None:
        args.save.write_text(report.json())
    if report.wrongs:
        what = "--quick" if args.quick else f"--faults {args.first + len(faults)} --first {args.first}"
        print(f"{len(report.wrongs)} wrong; again with: python -m chaos --seed {args.seed} {what}")
    return bool(report.wrongs)


def _left_out(what: str, kinds: set[str]) -> set[str]:
    print(f"there is no {what} here: without {', '.join(sorted(kinds))}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
