"""``python -m bench.page``: docs/reference/performance.md and its plots, made from the committed results.

``--check`` says whether the page is what the results give; plots are not compared, their text would differ by version.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench.curves import draw, tables
from bench.peers.measures import MEASURES
from bench.program import Program
from bench.programs import PROGRAMS
from bench.report import RESULTS, number, read, table

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "performance.md"
PLOTS = PAGE.parent / "performance"
_ORDER = ("drumline", "drumline-1", "pipes", "fal", "ray", "mosec", "litserve")
_PLOTTED = ("latency", "rate-32", "image", "tensor", "first", "delay")

_INTRO = """# Performance

Made by `python -m bench.page` from `bench/results`. Repeat it with `make bench-all`, or a part of it with `make bench-floors`,
`bench-start`, `bench-sizes`, `bench-ranks`, `bench-streams`, `bench-overload`, `bench-soak`, `bench-idle`, `bench-peers`,
`bench-operator`, `make chaos`. Every figure is measured beside its floor in the same run, because only ratios mean something
on another machine; `make bench-quick` in CI measures again what looks less than half as good as here, and fails when it is.

"""


def load(name: str) -> dict[str, Any] | None:
    """Return a committed result, or None when there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def page() -> str:
    """Return the page."""
    documents = ((program, load(program.name)) for program in PROGRAMS)
    parts = [_INTRO, *(_section(program, document) for program, document in documents if document is not None)]
    if (peers := load("peers")) is not None:
        parts.append(_peers(peers))
    if (operator := load("operator-1000")) is not None:
        parts.append(_rows(operator, "Operator with 1,000 apps on fake nodes"))
    if (chaos := load("chaos")) is not None:
        parts.append(_chaos(chaos))
    return "\n".join(parts).rstrip() + "\n"


def _machine(document: dict[str, Any]) -> str:
    facts = document["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    return (
        f"{document['date']}, {facts['cpu']}, {facts['usable_cores']} cores, {facts['system']}, Python {facts['python']}, "
        f"load average {facts['load_average']} at the start; {packages}."
    )


def _rows(document: dict[str, Any], title: str, intro: str = "") -> str:
    rows = [row for row in read(document) if not row.curve]
    rounds = _times(document["rounds"]) + (", shortened" if document["quick"] else "")
    words = f"{_machine(document)} Medians of {rounds}. {intro}".strip()
    return f"## {title}\n\n{words}\n" + (f"\n{table(rows)}\n" if rows else "")


def _times(rounds: int) -> str:
    return "one round" if rounds == 1 else f"{rounds} rounds"


def _section(program: Program, document: dict[str, Any]) -> str:
    text = _rows(document, program.title, program.intro)
    if curves := tables(program, read(document)):
        text += f"\n{curves}\n"
    if program.plots:
        pictures = [f"![{plot.title}](performance/{program.name}-{plot.name}.svg)" for plot in program.plots]
        text += "\n" + "\n".join(pictures) + "\n"
    return text


def _peers(document: dict[str, Any]) -> str:
    figures = document["figures"]
    names = [name for name in ("floor", *_ORDER) if name in figures]
    lines = [
        "## Beside others",
        "",
        f"{_machine(document)} Medians of {document['rounds']} interleaved rounds; every server does the same work "
        "(`bench/peers/servers/work.py`) and runs in an environment of its own.",
        "",
        "| | ranks | set up as |",
        "|---|---|---|",
        *(f"| {n} | {document['contestants'][n]['ranks']} | {document['contestants'][n]['settings']} |" for n in names),
        "",
        "| measure | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for key, title in _titles().items():
        cells = [_cell(figures, name, key) for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets: how many times ours.", "", *_better(document), ""]
    lines += [f"![{_titles()[key]}](performance/{key}.svg)" for key in _PLOTTED]
    lines += ["", "### When the process that works on a request is killed", ""]
    lines += ["| | the request in flight | its client knew after | served again after |", "|---|---|---|---|"]
    for name, end in document["deaths"].items():
        lines.append(f"| {name} | {end['answer']} | {_seconds(end['told_s'])} | {_seconds(end['back_s'])} |")
    return "\n".join(lines) + "\n"


def _better(document: dict[str, Any]) -> Iterator[str]:
    """Say where others are better than ours with as many ranks, the floor among them: it does without ranks."""
    figures, contestants = document["figures"], document["contestants"]
    ours = {contestants[name]["ranks"]: name for name in figures if name.startswith("drumline")}
    for name in (name for name in figures if name not in ours.values()):
        beside = ours.get(contestants[name]["ranks"], "drumline")
        found = []
        for key, title in _titles().items():
            theirs, mine = figures[name].get(key), figures[beside].get(key)
            if theirs and mine:
                ratio = median(mine) / median(theirs) if key in _LESS_IS_BETTER else median(theirs) / median(mine)
                if ratio > 1:
                    found.append(f"{title.partition(' (')[0]} {number(ratio)}x")
        yield f"- **{name}** is better than `{beside}` in: {'; '.join(found) or 'nothing'}."


def _chaos(document: dict[str, Any]) -> str:
    ends = ", ".join(f"{name} {count}" for name, count in document["outcomes"].items())
    slopes = document["server_memory_mib_per_100_faults"]
    grew = (
        f" Memory of a server: {', '.join(f'{slope:+.1f}' for slope in slopes)} MiB per 100 faults." if slopes else ""
    )
    lines = [
        f"## {sum(document['faults'].values()):,} faults",
        "",
        f"{_machine(document)} `make chaos` with seed {document['seed']}, {document['callers']} callers and "
        f"{document['ranks']} ranks, {document['duration_s'] / 60:.0f} minutes: "
        f"{len(document['findings']) or 'nothing'} wrong. "
        f"[What is broken, and what must hold](../architecture/chaos.md).",
        "",
        f"{document['requests']:,} requests: {ends}. The server was started {document['server_lives']} times.{grew}",
        "",
        "| fault | how often | served again after, at most |",
        "|---|---|---|",
        *(f"| {kind} | {count} | {document['slowest_s'][kind]:.1f} s |" for kind, count in document["faults"].items()),
    ]
    return "\n".join(lines) + "\n"


_LESS_IS_BETTER = {measure.key for measure in MEASURES if not measure.more_is_better} | {"start", "memory"}


def _titles() -> dict[str, str]:
    titles = {measure.key: f"{measure.title} ({measure.unit})" for measure in MEASURES}
    return titles | {"start": "command to first answer (s)", "memory": "memory of all processes, USS (MiB)"}


def _cell(figures: dict[str, dict[str, list[float]]], name: str, key: str) -> str:
    values, ours = figures[name].get(key), figures["drumline"].get(key)
    if not values:
        return "none in time"
    cell = number(median(values))
    return cell if name == "drumline" or not ours else f"{cell} ({number(median(values) / median(ours))}x)"


def _seconds(value: float | None) -> str:
    return "not within 30 s" if value is None else f"{value:.2f} s"


def plots() -> None:
    """Write all pictures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "drumline"
    PLOTS.mkdir(exist_ok=True)
    for program in PROGRAMS:
        if (document := load(program.name)) is not None:
            for each in program.plots:
                draw(program, each, read(document), PLOTS / f"{program.name}-{each.name}.svg")
    if (peers := load("peers")) is not None:
        _plot_peers(peers)


def _plot_peers(document: dict[str, Any]) -> None:
    """Write one bar chart per measure."""
    from matplotlib import pyplot

    figures = document["figures"]
    names = [name for name in ("floor", *_ORDER) if name in figures]
    for key in _PLOTTED:
        shown = [name for name in names if figures[name].get(key)]
        values = [median(figures[name][key]) for name in shown]
        spread = [[v - min(figures[n][key]), max(figures[n][key]) - v] for n, v in zip(shown, values, strict=True)]
        figure, axes = pyplot.subplots(figsize=(6.4, 0.4 * len(shown) + 1.1))
        colours = ["#0b7285" if name.startswith("drumline") else "#adb5bd" for name in shown]
        axes.barh(shown, values, color=colours, xerr=list(zip(*spread, strict=True)), ecolor="#495057")
        axes.invert_yaxis()
        axes.set_title(_titles()[key], fontsize=10, loc="left")
        if max(values) > 20 * min(values):
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(PLOTS / f"{key}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if args.check:
        same = PAGE.is_file() and PAGE.read_text() == text
        print("up to date" if same else f"{PAGE.name} is not what bench/results gives: run python -m bench.page")
        return int(not same)
    PAGE.write_text(text)
    plots()
    print(f"wrote {PAGE.relative_to(PAGE.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
