"""``python -m bench.peers``: the same work behind every server, measured in turn in one run, saved as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from bench.compare import judge
from bench.others import Others
from bench.peers.contestants import CONTESTANTS, Contestant, running
from bench.peers.measures import MEASURES, QUICK, Death, Effort, Measure, death
from bench.report import RESULTS, Row, machine, number

Figures = dict[str, dict[str, list[float]]]
"""By contestant and measure: one value per round."""


async def rounds(
    contestants: list[Contestant], count: int, effort: Effort, measures: Sequence[Measure] = MEASURES
) -> Figures:
    """Measure all contestants, which run side by side, one after another in every round; each round begins with another."""
    figures: Figures = {contestant.name: {} for contestant in contestants}
    with ExitStack() as stack:
        servers = []
        for contestant in contestants:
            servers.append(stack.enter_context(running(contestant)))
            _say(f"{contestant.name} serves")
        for i in range(count):
            for measure in measures:
                for server in servers[i % len(servers) :] + servers[: i % len(servers)]:
                    value = await measure.take(server, effort)
                    if value is not None:
                        figures[server.contestant.name].setdefault(measure.key, []).append(value)
            _say(f"round {i + 1} of {count}")
        for server in servers:
            figures[server.contestant.name]["memory"] = [server.memory() / (1 << 20)]
    return figures


def starts(contestants: list[Contestant], count: int) -> dict[str, list[float]]:
    """Start every contestant alone, one after another in every round; seconds from the command to the first answer.

    There is one round more, which does not count: it has the files of each in memory, where those of the one before are.
    """
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for i in range(count + 1):
        for contestant in contestants:
            started = time.perf_counter()
            with running(contestant):
                took = time.perf_counter() - started
            if i:
                seconds[contestant.name].append(took)
        _say(f"starts, round {i} of {count}" if i else "all have been started once")
    return seconds


async def deaths(contestants: list[Contestant]) -> dict[str, Death]:
    """Kill a process of each contestant that has any beside the server itself."""
    seen = {}
    for contestant in contestants:
        if contestant.ranks:
            with running(contestant) as server:
                seen[contestant.name] = await death(server)
            _say(f"{contestant.name}: {seen[contestant.name]}")
    return seen


def table(figures: Figures) -> str:
    """Return the medians, one line per measure, with the ratio to ours in brackets."""
    names = list(figures)
    titles = {measure.key: f"{measure.title} ({measure.unit})" for measure in MEASURES}
    titles |= {"start": "command to first answer (s)", "memory": "memory of all processes, USS (MiB)"}
    lines = [("measure", *names), ("-",) * (len(names) + 1)]
    for key, title in titles.items():
        cells = []
        for name in names:
            values = figures[name].get(key)
            ours = figures.get("drumline", {}).get(key)
            cell = number(median(values)) if values else "-"
            if values and ours and name != "drumline":
                cell += f" ({number(median(values) / median(ours))}x)"
            cells.append(cell)
        lines.append((title, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(figures: Figures, others: float = 0.0) -> list[Row]:
    """Return ours against the floor, one row per measure, to be compared with another run.

    Args:
        figures: of ours and of the floor.
        others: the share of the machine that other programs had meanwhile.
    """
    rows = []
    for measure in MEASURES:
        ours, floor = figures["drumline"].get(measure.key), figures["floor"].get(measure.key)
        if ours and floor:
            row = Row(f"peers-{measure.key}", measure.title, at_least=measure.more_is_better)
            for our, bare in zip(ours, floor, strict=True):
                row.add(our / bare, ours_n=our, floor_n=bare)
            row.beside(others)
            rows.append(row)
    return rows


def check(contestants: list[Contestant], figures: Figures, others: float) -> int:
    """Compare with the committed figures, see :func:`bench.compare.judge`; 1 when ours is less than half as good."""

    def again(keys: list[str]) -> list[Row]:
        measures = [measure for measure in MEASURES if f"peers-{measure.key}" in keys]
        meter = Others()
        figures = asyncio.run(rounds(contestants, 1, QUICK, measures))
        return rows_of(figures, meter.share())

    before = rows_of(json.loads((RESULTS / "peers.json").read_text())["figures"])
    findings = judge(before, rows_of(figures, others), again, _say)
    print("\n".join(map(str, findings)) or "as good as committed")
    return int(any(finding.bad for finding in findings))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, save; with ``--check`` return 1 when a ratio has fallen."""
    names = [contestant.name for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter and less exact")
    parser.add_argument("--rounds", type=int, help="rounds (default 5, with --quick 1)")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--name", help="save as bench/results/NAME.json (default: peers; with --quick or --only nothing)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="ours and the floor alone, --quick; fails when less than half as good as committed",
    )
    parser.add_argument("--no-deaths", action="store_true", help="kill nothing")
    parser.add_argument("--starts", action="store_true", help="measure starts alone, anew, into the committed figures")
    args = parser.parse_args()
    if args.starts:
        return _starts_anew(args.rounds or 5)
    if args.check:
        args.quick, args.only, args.no_deaths = True, ["floor", "drumline"], True
    count = args.rounds or (1 if args.quick else 5)
    chosen = [contestant for contestant in CONTESTANTS if contestant.name in args.only]
    facts: dict[str, Any] = machine()
    meter = Others()
    figures = asyncio.run(rounds(chosen, count, QUICK if args.quick else Effort()))
    if not args.check:
        for name, seconds in starts(chosen, 1 if args.quick else count).items():
            figures[name]["start"] = seconds
    others = meter.share()
    _say(f"others had {others:.0%} of the machine")
    ends = {} if args.no_deaths else asyncio.run(deaths(chosen))
    print(table(figures))
    for name, end in ends.items():
        print(
            f"{name}: killed in flight: {end.answer}, told after {_seconds(end.told_s)}, serves after {_seconds(end.back_s)}"
        )
    if args.check:
        return check(chosen, figures, others)
    file = args.name or (None if args.quick or args.only != names else "peers")
    if file:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "quick": args.quick,
            "rounds": count,
            "machine": facts,
            "contestants": {each.name: {"ranks": each.ranks, "settings": each.settings} for each in chosen},
            "figures": figures,
            "deaths": {name: asdict(end) for name, end in ends.items()},
        }
        path = RESULTS / f"{file}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"saved as {path.relative_to(RESULTS.parents[1])}")
    return 0


def _starts_anew(count: int) -> int:
    path = RESULTS / "peers.json"
    document = json.loads(path.read_text())
    chosen = [contestant for contestant in CONTESTANTS if contestant.name in document["figures"]]
    for name, seconds in starts(chosen, count).items():
        document["figures"][name]["start"] = seconds
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document["figures"]))
    return 0


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
