"""What ``python -m bench`` runs: a named set of benches, each an async generator of rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from bench.report import Row

Bench = Callable[[int, Any], AsyncIterator[Row]]
"""Takes the number of rounds and the effort; its name and the first line of its docstring are shown."""


@dataclass(frozen=True)
class Plot:
    """One picture of a program's curves.

    Attributes:
        name: of the file, after the program's own.
        title: above it.
        curves: which; in this order.
        part: what is drawn, ``value`` or the name of a part; of a part ``ours_*`` the floor is drawn, too.
        label: of the y axis.
    """

    name: str
    title: str
    curves: tuple[str, ...]
    part: str = "value"
    label: str = ""


@dataclass(frozen=True)
class Program:
    """One set of benches with a result file of its own.

    Attributes:
        name: ``make bench-<name>`` and ``bench/results/<name>.json``.
        title: the page's heading.
        benches: what is run.
        full: the effort of a whole run.
        quick: with ``--quick``.
        quick_benches: what is run with ``--quick``; None: all.
        rounds: of a whole run.
        quick_rounds: with ``--quick``.
        axis: for programs with curves, what their points lie along, e.g. ``"ranks"``.
        axis_bytes: the axis counts bytes.
        plots: pictures on the page.
        intro: what one needs to know to read the section.
    """

    name: str
    title: str
    benches: tuple[Bench, ...]
    full: Any
    quick: Any
    quick_benches: tuple[Bench, ...] | None = None
    rounds: int = 7
    quick_rounds: int = 2
    axis: str = ""
    axis_bytes: bool = False
    plots: tuple[Plot, ...] = ()
    intro: str = ""

    def chosen(self, quick: bool) -> tuple[Bench, ...]:
        """Return the benches of a run."""
        return self.benches if self.quick_benches is None or not quick else self.quick_benches
