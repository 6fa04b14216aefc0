"""Rows, goals, the table and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "pyzmq", "fastapi", "uvicorn", "uvloop", "pydantic", "msgspec", "pillow", "numpy")


@dataclass
class Row:
    """One line of the table: one value per round, and what it was made of.

    Attributes:
        key: short name, for ``--only``.
        title: what is measured, as in the table of goals.
        goal: the value to reach; None for a line that only informs.
        unit: ``x`` for ratios, else of the values.
        at_least: the goal is a lower bound.
        values: one per round.
        parts: per round the figures that the value was made of, e.g. ``{"ours_us": 48.0, "floor_us": 115.1}``.
        note: what one needs to know to read it.
        curve: for one point of a curve, the curve's name; ``title`` is then the same for all of its points.
        x: where on the curve, in the unit of the program's axis.
        quick: measured with ``--quick``, too, where it is compared with what is committed.
        others: per round, the share of the machine that other programs had meanwhile (``bench.others``).
    """

    key: str
    title: str
    goal: float | None = None
    unit: str = "x"
    at_least: bool = False
    values: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    note: str = ""
    curve: str = ""
    x: float | None = None
    quick: bool = True
    others: list[float] = field(default_factory=list)

    def add(self, value: float, **parts: float) -> None:
        """Add one round."""
        self.values.append(value)
        self.parts.append(parts)

    def beside(self, share: float) -> None:
        """Say what others had of the machine in all rounds of which that is not said yet."""
        self.others += [round(share, 3)] * (len(self.values) - len(self.others))

    def extend(self, more: Row) -> None:
        """Add the rounds of another run."""
        self.beside(0.0)  # where nobody has said it
        self.values += more.values
        self.parts += more.parts
        self.others += more.others
        self.note = more.note or self.note

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def part_text(self) -> str:
        """The medians of the parts, e.g. ``ours 48 us, floor 115 us``."""
        words = []
        for name in self.parts[0] if self.parts else ():
            label, _, unit = name.rpartition("_")
            words.append(f"{label.replace('_', ' ')} {number(median(p[name] for p in self.parts))} {UNITS[unit]}")
        return ", ".join(words)


UNITS = {"us": "µs", "ms": "ms", "s": "s", "rps": "/s", "MiB": "MiB", "KiB": "KiB", "B": "B", "pct": "%", "n": ""}


def number(value: float) -> str:
    """Return three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".rpartition("e")[2]))
    return f"{value:.{min(digits, 4)}f}"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [("measure", "median", "min .. max", "goal", "", "made of (medians)")]
    for row in rows:
        sign = {"x": "x"}.get(row.unit, f" {row.unit}")
        bound = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}{sign}"
        mark = {True: "met", False: "MISSED", None: ""}[row.met]
        spread = f"{number(min(row.values))} .. {number(max(row.values))}"
        lines.append((row.title, f"{number(row.value)}{sign}", spread, bound, mark, row.part_text()))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(padded)


def machine() -> dict[str, Any]:
    """Return facts that explain the figures; nothing that names the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read(document: dict[str, Any]) -> list[Row]:
    """Return the rows of a saved document."""
    known = Row.__dataclass_fields__
    return [Row(**{key: value for key, value in row.items() if key in known}) for row in document["rows"]]


def save(rows: list[Row], name: str, *, rounds: int, quick: bool, facts: dict[str, Any]) -> Path:
    """Write ``bench/results/<name>.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "rounds": rounds,
        "machine": facts,
        "rows": [{**asdict(row), "value": row.value, "met": row.met} for row in rows],
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return path
