"""``python -m bench [PROGRAM ...]``: measure floors and ours in one run, print tables, save them as JSON."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Collection
from typing import Any

import uvloop

from bench.compare import committed, judge
from bench.others import Others
from bench.program import Program
from bench.programs import PROGRAMS
from bench.report import Row, machine, save, table


async def run(program: Program, rounds: int, quick: bool, only: Collection[str]) -> dict[str, list[Row]]:
    """Run a program's benches, say which one is at work, and return the rows of each."""
    rows: dict[str, list[Row]] = {}
    effort: Any = program.quick if quick else program.full
    for bench in program.chosen(quick):
        if only and bench.__name__ not in only:
            continue
        started = time.perf_counter()
        words = (bench.__doc__ or "").splitlines()[0]
        print(f"{program.name:8} {bench.__name__:10} {words}", end="", file=sys.stderr, flush=True)
        others = Others()
        rows[bench.__name__] = [row async for row in bench(rounds, effort)]
        share = others.share()
        for row in rows[bench.__name__]:
            row.quick = bench in program.chosen(True) and row.quick
            row.beside(share)
        seconds = time.perf_counter() - started
        print(f"  {seconds:.0f} s, others had {share:.0%} of the machine", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Measure, print, save; with ``--quick`` compare with what is committed, and return 1 when a ratio has fallen."""
    names = [program.name for program in PROGRAMS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="short rounds; fails when a ratio is less than half as good as committed"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each bench")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="BENCH", help="some benches of a program; saves nothing"
    )
    parser.add_argument("--no-save", action="store_true", help="leave bench/results alone")
    args = parser.parse_args()
    if unknown := set(args.programs) - set(names):
        parser.error(f"no such program: {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    logging.getLogger("drumline").setLevel(logging.ERROR)  # restarts are part of the bench
    worse = 0
    for program in PROGRAMS:
        if not args.programs or program.name in args.programs:
            worse += measure(program, args)
    return int(worse > 0)


def measure(program: Program, args: argparse.Namespace) -> int:
    """Run one program; return how many of its rows are worse than committed."""
    rounds = args.rounds or (program.quick_rounds if args.quick else program.rounds)
    facts = machine()
    if facts["load_average"] > 0.5 * facts["usable_cores"]:
        print(f"the machine is busy (load {facts['load_average']}): ratios will be rough", file=sys.stderr)
    found = uvloop.run(run(program, rounds, args.quick, args.only))
    rows = [row for each in found.values() for row in each]
    print(f"\n{program.title}\n\n{table(rows)}\n", flush=True)
    if args.quick:
        return 0 if args.only else check(program, found)
    if not (args.only or args.no_save):
        path = save(rows, program.name, rounds=rounds, quick=False, facts=facts)
        print(f"saved as {path.relative_to(path.parents[2])}", flush=True)
    return 0


def check(program: Program, found: dict[str, list[Row]]) -> int:
    """Compare a quick run with the committed one, see :func:`bench.compare.judge`; return how many rows are worse."""

    def again(keys: list[str]) -> list[Row]:
        only = [bench for bench, rows in found.items() if any(row.key in keys for row in rows)]
        return [row for rows in uvloop.run(run(program, 1, True, only)).values() for row in rows]

    findings = judge(committed(program.name), [row for rows in found.values() for row in rows], again, _say)
    print("\n".join(map(str, findings)) or "as good as committed", flush=True)
    return sum(finding.bad for finding in findings)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
