"""All programs of ``python -m bench``, in the order of the page."""

from __future__ import annotations

from bench import idle, ours, overload, ranks, sizes, soak, start, streams
from bench.program import Program

PROGRAMS: tuple[Program, ...] = (
    ours.PROGRAM,
    start.PROGRAM,
    sizes.PROGRAM,
    ranks.PROGRAM,
    streams.PROGRAM,
    overload.PROGRAM,
    soak.PROGRAM,
    idle.PROGRAM,
)
