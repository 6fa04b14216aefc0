"""Curves of a program's rows: as tables and as pictures of the page."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench.program import Plot, Program
from bench.report import UNITS, Row, number


def by_curve(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the points of each curve, along the axis."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.curve:
            curves.setdefault(row.curve, []).append(row)
    return {name: sorted(points, key=lambda row: row.x or 0) for name, points in curves.items()}


def size(count: float) -> str:
    """Return e.g. ``64 B`` or ``16 MiB``."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:g} {unit}"
    return f"{count:g} B"


def tables(program: Program, rows: list[Row]) -> str:
    """Return one Markdown table per curve: a line per point."""
    texts = []
    for points in by_curve(rows).values():
        first = points[0]
        parts = list(first.parts[0]) if first.parts else []
        sign = "x" if first.unit == "x" else f" {first.unit}"
        goal = first.goal is not None
        head = [program.axis, *(part.rpartition("_")[0].replace("_", " ") for part in parts), "median", "min .. max"]
        if goal:
            head.append(f"goal {'>=' if first.at_least else '<='} {first.goal:g}{sign}")
        lines = [f"**{first.title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in points:
            at = size(row.x or 0) if program.axis_bytes else f"{row.x:g}"
            medians = [f"{number(_part(row, part))} {UNITS[part.rpartition('_')[2]]}".strip() for part in parts]
            cells = [at, *medians, number(row.value) + sign, f"{number(min(row.values))} .. {number(max(row.values))}"]
            if goal:
                cells.append("met" if row.met else "MISSED")
            lines.append("| " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _part(row: Row, part: str) -> float:
    return median(parts[part] for parts in row.parts)


def draw(program: Program, plot: Plot, rows: list[Row], path: Path) -> None:
    """Write one picture: a line per curve with its spread, and its floor dashed."""
    from matplotlib import pyplot

    curves = by_curve(rows)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    for name in plot.curves:
        points = curves[name]
        xs = [row.x or 0 for row in points]
        lines = [("", "-", plot.part)]
        if plot.part.startswith("ours_") and (floor := f"floor_{plot.part[5:]}") in points[0].parts[0]:
            lines.append((" (floor)", "--", floor))
        colour = None
        for suffix, style, part in lines:
            values = [[parts[part] for parts in row.parts] for row in points]
            middle = [median(each) for each in values]
            spread = [[m - min(v), max(v) - m] for m, v in zip(middle, values, strict=True)]
            drawn = axes.errorbar(xs, middle, yerr=list(zip(*spread, strict=True)), fmt=style, marker=".", capsize=2,
                                  color=colour, label=name + suffix)  # fmt: skip
            colour = drawn.lines[0].get_color()
    _scales(program, axes, [row.x or 0 for name in plot.curves for row in curves[name]])
    axes.set_title(plot.title, fontsize=10, loc="left")
    axes.set_ylabel(plot.label)
    axes.set_xlabel(program.axis)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _scales(program: Program, axes: Any, xs: list[float]) -> None:
    low, high = axes.get_ylim()
    if max(xs) >= 8 * max(min(xs), 1e-9):
        axes.set_xscale("log", base=2)
        ticks = sorted(set(xs))
        axes.set_xticks(ticks, [size(x) if program.axis_bytes else f"{x:g}" for x in ticks], fontsize=7)
        axes.minorticks_off()
    if program.axis_bytes:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(high, low))
