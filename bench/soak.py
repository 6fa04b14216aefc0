"""Whether memory or descriptors grow with the number of requests and streams: the slope, with its confidence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from statistics import fmean

from bench import floors
from bench.group import beside
from bench.processes import Served, family
from bench.program import Program
from bench.report import Row

CONNECTIONS = 16
EVENTS = 5
_KIB = 1 << 10
#: Student's t for 95 %, two-sided, by degrees of freedom; beyond the last one its own value is close enough.
_STUDENT = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    10: 2.23,
    12: 2.18,
    15: 2.13,
    20: 2.09,
}


@dataclass(frozen=True)
class Effort:
    """How many requests and streams in one round, and how often memory is looked at on the way."""

    requests: int = 100_000
    streams: int = 10_000
    looks: int = 20
    warm: int = 5_000


QUICK = Effort(requests=2000, streams=300, looks=3, warm=300)


@dataclass(frozen=True)
class Slope:
    """A straight line through samples: by how much ``y`` grows per ``x``, and half the width of its 95 % interval."""

    per_x: float
    margin: float


def slope_of(xs: list[float], ys: list[float]) -> Slope:
    """Fit a line by least squares. PURE.

    The interval takes the samples as independent, which pages that an allocator keeps are not quite: it is a little too
    narrow.

    Args:
        xs: at least three different values.
        ys: as many.
    """
    middle_x, middle_y = fmean(xs), fmean(ys)
    width = sum((x - middle_x) ** 2 for x in xs)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / width
    rest = sum((y - middle_y - slope * (x - middle_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    freedom = len(xs) - 2
    student = next((t for n, t in sorted(_STUDENT.items(), reverse=True) if n <= freedom), _STUDENT[1])
    return Slope(slope, student * (rest / freedom / width) ** 0.5)


@dataclass(frozen=True)
class Look:
    """One moment.

    Attributes:
        served: requests since the first look.
        memory: bytes by role (``server``, ``nursery``, ``rank``), the unique set size; of several ranks the largest.
        resident: bytes of the server, the resident set size.
        descriptors: open ones of all processes.
    """

    served: int
    memory: dict[str, int]
    resident: int
    descriptors: int


def look(server: Served, served: int) -> Look:
    """Look at the server's processes: itself, its nursery, the nursery's children."""
    with server.visited("/readyz"):  # answered: it has also noticed that the load client's connections are gone
        first, *children = family(server.process.pid)
        memory = {"server": first.memory_full_info().uss}
        for child in children:
            role = "nursery" if child.ppid() == first.pid else "rank"
            memory[role] = max(memory.get(role, 0), child.memory_full_info().uss)
        return Look(served, memory, first.memory_info().rss, sum(process.num_fds() for process in (first, *children)))


async def _looks(server: Served, path: str, body: dict[str, object], total: int, effort: Effort) -> list[Look]:
    connections = min(CONNECTIONS, total)
    await server.load(body, path=path, connections=connections, requests=min(effort.warm, total), warmup=0)
    looks = [look(server, 0)]
    part = total // effort.looks
    for i in range(effort.looks):
        await server.load(body, path=path, connections=connections, requests=part, warmup=0)
        looks.append(look(server, (i + 1) * part))
    return looks


async def soaks(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Requests and then streams from 16 connections, beside a bare FastAPI server that gets a tenth of them."""
    for _ in range(rounds):
        async with beside(floors.BareFastAPI(), "Streams") as (bare, server):
            for row in await _soak("requests", "/", {"count": 0}, effort.requests, bare, server, effort):
                yield row
            for row in await _soak("streams", "/stream", {"count": EVENTS}, effort.streams, bare, server, effort):
                yield row


async def _soak(
    what: str, path: str, body: dict[str, object], total: int, bare: Served, server: Served, effort: Effort
) -> list[Row]:
    rows = {
        role: Row(f"soak-{what}-{role}", f"{words}: growth over {total:,} {what}, 95 % sure it is at most", 1024, "KiB")
        for role, words in (("server", "the server's USS"), ("rank", "a rank's USS"), ("nursery", "the nursery's USS"))
    }
    descriptors = Row(f"soak-{what}-descriptors", f"descriptors that {total:,} {what} leave open", 0, "descriptors")
    floor = await _looks(bare, path, body, max(effort.looks, total // 10), effort)
    looks = await _looks(server, path, body, total, effort)
    for role, row in rows.items():
        ours, fastapi = _growth(looks, role, total), _growth(floor, "server", total)
        row.add(
            ours.per_x + ours.margin,
            slope_KiB=ours.per_x,
            margin_KiB=ours.margin,
            fastapi_KiB=fastapi.per_x,
            end_KiB=looks[-1].memory[role] / _KIB,
        )
    descriptors.add(looks[-1].descriptors - looks[0].descriptors, open_n=looks[-1].descriptors)
    return [*rows.values(), descriptors]


def _growth(looks: list[Look], role: str, total: int) -> Slope:
    """KiB that ``total`` requests add."""
    slope = slope_of([each.served for each in looks], [each.memory[role] for each in looks])
    return Slope(slope.per_x * total / _KIB, slope.margin * total / _KIB)


PROGRAM = Program(
    name="soak",
    title="Memory over many requests",
    benches=(soaks,),
    full=Effort(),
    quick=QUICK,
    rounds=1,
    quick_rounds=1,
    intro="A straight line through the unique set size of each process while requests pass, after a warm-up of "
    f"{Effort().warm:,}; the growth that is shown is its slope times the number of requests, plus the margin of its 95 % "
    "confidence interval. The floor is a bare FastAPI server.",
)
