"""``python -m bench [PROGRAM ...]``: measure floors and ours in one run, print tables, save them as JSON."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Any

import uvloop

from bench.compare import committed, compare
from bench.program import Program
from bench.programs import PROGRAMS
from bench.report import Row, busy, machine, save, table


async def run(program: Program, rounds: int, quick: bool, only: list[str]) -> list[Row]:
    """Run a program's benches, say which one is at work, and return their rows."""
    rows = []
    effort: Any = program.quick if quick else program.full
    for bench in program.chosen(quick):
        if only and bench.__name__ not in only:
            continue
        started = time.perf_counter()
        words = (bench.__doc__ or "").splitlines()[0]
        print(f"{program.name:8} {bench.__name__:10} {words}", end="", file=sys.stderr, flush=True)
        async for row in bench(rounds, effort):
            row.quick = bench in program.chosen(True) and row.quick
            rows.append(row)
        print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
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
    rows = uvloop.run(run(program, rounds, args.quick, args.only))
    print(f"\n{program.title}\n\n{table(rows)}\n", flush=True)
    if args.quick:
        return 0 if args.only else check(program, rounds, rows, judged=not busy(facts))
    if not (args.only or args.no_save):
        path = save(rows, program.name, rounds=rounds, quick=False, facts=facts)
        print(f"saved as {path.relative_to(path.parents[2])}", flush=True)
    return 0


def check(program: Program, rounds: int, rows: list[Row], *, judged: bool) -> int:
    """Compare a quick run with the committed one; return how many rows are worse, in a second run, too.

    One short round on a machine that does something else meanwhile says little: what is worse has to be so twice, and on
    a machine that is too busy (``judged`` is False) ratios are only told.
    """
    if not judged:
        print("the machine is too busy to judge ratios: this run shows that the program works", flush=True)
    before = committed(program.name)
    findings = compare(before, rows, ratios=judged)
    if any(finding.bad for finding in findings):
        print("\n".join(map(str, findings)) + "\nonce more:", flush=True)
        again = {row.key: row for row in uvloop.run(run(program, rounds, True, []))}
        for row in rows:
            row.values += again[row.key].values
            row.parts += again[row.key].parts
        findings = compare(before, rows, ratios=judged)
    print("\n".join(map(str, findings)) or "as good as committed", flush=True)
    return sum(finding.bad for finding in findings)


if __name__ == "__main__":
    sys.exit(main())
