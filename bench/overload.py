"""What happens when more requests come than can be served: open-loop arrivals from half of the capacity to three times it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from statistics import median

from bench import floors
from bench.group import beside
from bench.processes import OpenLoad
from bench.program import Plot, Program
from bench.report import Row

#: What one request takes on the ranks; long enough that the client has time to send three times as many.
SERVICE_SECONDS = 0.002
#: Requests that may wait: the default of the settings, said here because the wait is compared with it.
QUEUE = 64
_CALLERS = 16
_BUSY = 429


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    loads: tuple[float, ...] = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
    seconds: float = 3.0


QUICK = Effort(loads=(0.5, 3.0), seconds=1.0)


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


def goodput(load: OpenLoad) -> float:
    """Return the requests a second that were served.

    Raises:
        RuntimeError: an answer was neither a result nor a 429.
    """
    if other := set(load.latencies) - {200, _BUSY}:
        raise RuntimeError(f"answers with status {sorted(other)}: {[len(load.latencies[s]) for s in sorted(other)]}")
    return len(load.latencies.get(200, [])) / load.seconds


class Point:
    """The rows of one offered load."""

    def __init__(self, offered: float) -> None:
        self.offered = offered
        quick = offered in QUICK.loads
        self.good = Row(f"overload-goodput-{offered:g}", "goodput / what could be served of the offered load", 0.9,
                        at_least=True, curve="goodput", x=offered, quick=quick)  # fmt: skip
        self.wait = Row(f"overload-wait-{offered:g}", "answer of an accepted request, p99 / a full queue's run time", 1.25,
                        curve="wait", x=offered, quick=quick)  # fmt: skip
        # Below the capacity there may be none.
        refused = quick and offered > 1
        self.refusal = Row(f"overload-refusal-{offered:g}", "429, p50 / a bare FastAPI answer at that rate",
                           curve="refusal", x=offered, quick=refused)  # fmt: skip
        self.tail = Row(f"overload-refusal-p99-{offered:g}", "429, p99", 20, "ms", curve="refusal p99", x=offered,
                        quick=refused)  # fmt: skip
        self.rows = (self.good, self.wait, self.refusal, self.tail)

    def add(self, load: OpenLoad, floor: OpenLoad, capacity: float, seconds: float) -> None:
        """Add one round: what was seen of ours and of a bare server at the same rate."""
        able = min(capacity, load.sent / load.seconds)  # arrivals are random: what was sent is what was offered
        served = goodput(load)
        self.good.add(served / able, ours_rps=served, floor_rps=able, offered_rps=load.sent / seconds)
        full = (QUEUE + 1) / capacity
        p99 = _p99(load.latencies[200])
        self.wait.add(p99 / full, ours_ms=p99 * 1e3, full_ms=full * 1e3)
        if refused := load.latencies.get(_BUSY):
            ms = [median(each) * 1e3 for each in (refused, floor.latencies[200])]
            self.refusal.add(ms[0] / ms[1], ours_ms=ms[0], floor_ms=ms[1], share_pct=100 * len(refused) / load.sent)
            self.tail.add(_p99(refused) * 1e3, p50_ms=ms[0])


async def overloads(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Offered load, as a multiple of what 16 callers in a loop get; refusals beside a bare FastAPI answer at that rate."""
    points = [Point(offered) for offered in effort.loads]
    body = {"seconds": SERVICE_SECONDS}
    async with beside(floors.BareFastAPI(), "Paced", max_queue_depth=str(QUEUE)) as (bare, server):
        for _ in range(rounds):
            capacity = (await server.load(body, connections=_CALLERS, seconds=effort.seconds)).per_second
            for point in points:
                rate = point.offered * capacity
                load = await server.open_load(body, rate=rate, seconds=effort.seconds)
                floor = await bare.open_load({"prompt": floors.PROMPT}, rate=rate, seconds=effort.seconds)
                point.add(load, floor, capacity, effort.seconds)
    for rows in zip(*(point.rows for point in points), strict=True):
        for row in rows:
            if row.values:
                yield row


PROGRAM = Program(
    name="overload",
    title="Under overload",
    benches=(overloads,),
    full=Effort(),
    quick=QUICK,
    rounds=2,
    quick_rounds=1,
    axis="offered load / capacity",
    plots=(
        Plot("goodput", "requests served a second over the offered load", ("goodput",), "ours_rps", "/s"),
        Plot("refusal", "how fast a request is refused", ("refusal",), "ours_ms", "ms"),
    ),
    intro=f"Requests of {SERVICE_SECONDS * 1e3:g} ms arrive at random (Poisson), whether or not others were answered; "
    f"{QUEUE} may wait. Capacity is what {_CALLERS} callers in a loop are served.",
)
