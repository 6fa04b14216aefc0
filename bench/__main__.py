"""``python -m bench``: measure floors and ours in one run, print the table, save it as JSON."""

from __future__ import annotations

import argparse
import logging
import sys
import time

import uvloop

from bench.ours import BENCHES, QUICK, Effort
from bench.report import Row, machine, save, table


async def run(rounds: int, effort: Effort, only: list[str]) -> list[Row]:
    """Run the benches, say which one is at work, and return their rows."""
    rows = []
    for bench in BENCHES:
        if only and bench.__name__ not in only:
            continue
        started = time.perf_counter()
        print(f"{bench.__name__:10} {(bench.__doc__ or '').splitlines()[0]}", end="", file=sys.stderr, flush=True)
        async for row in bench(rounds, effort):
            rows.append(row)  # noqa: PERF401  # an async comprehension hides where it stops
        print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, print, save."""
    names = [bench.__name__ for bench in BENCHES]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer and shorter rounds, less exact")
    parser.add_argument("--rounds", type=int, help="rounds of each bench (default 7, with --quick 2)")
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="BENCH", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--name", help="save as bench/results/NAME.json (default: latest, with --quick or --only nothing)"
    )
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 7)
    logging.getLogger("drumline").setLevel(logging.ERROR)  # restarts are part of the bench
    facts = machine()
    if facts["load_average"] > 0.5 * facts["usable_cores"]:
        print(f"the machine is busy (load {facts['load_average']}): ratios will be rough", file=sys.stderr)
    rows = uvloop.run(run(rounds, QUICK if args.quick else Effort(), args.only))
    print(table(rows))
    name = args.name or (None if args.quick or args.only else "latest")
    if name:
        path = save(rows, name, rounds=rounds, quick=args.quick, facts=facts)
        print(f"saved as {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
