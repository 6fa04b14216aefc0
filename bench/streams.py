"""Streams: events a second, one stream's and many at once, whether all are served alike, and when the first event comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from bench import floors
from bench.group import beside, in_turn, running
from bench.program import Plot, Program
from bench.report import Row
from drumline.testing import bench_workers


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    counts: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 512)
    seconds: float = 1.5
    burst: int = 10_000


#: Updates of each of many streams.
EVENTS = 20
QUICK = Effort(counts=(1, 128), seconds=0.8, burst=2000)


async def in_process(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """One stream of many updates without a pause, in process."""
    row = Row("event-rate", "events/s of one stream in process", unit="/s", at_least=True)
    async with running(bench_workers.Streams) as runner:
        for i in range(rounds + 1):
            started = time.perf_counter()
            seen = 0
            async for _ in runner.stream({"count": effort.burst}):
                seen += 1
            if i:  # the first one warms up
                row.add(seen / (time.perf_counter() - started))
    yield row


async def many(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """A long stream; then connections that each begin the next stream when the last has ended, beside bare FastAPI."""
    burst = Row("event-rate-http", "events/s of one stream over HTTP / bare FastAPI", at_least=True)
    rows = []
    body, long = {"count": EVENTS}, {"count": effort.burst}
    async with beside(floors.BareFastAPI(), "Streams", max_queue_depth=str(2 * max(effort.counts))) as (bare, server):
        for i in range(rounds):
            floor, ours = await in_turn(
                i,
                lambda: bare.load(long, path="/stream", requests=2, warmup=0),
                lambda: server.load(long, path="/stream", requests=2, warmup=0),
            )
            rates = [effort.burst / load.latencies[1] for load in (ours, floor)]
            burst.add(rates[0] / rates[1], ours_rps=rates[0], floor_rps=rates[1])
        for count in effort.counts:
            quick = count in QUICK.counts
            rate = Row(f"streams-rate-{count}", "events/s of all streams / bare FastAPI", at_least=True,
                       curve="rate", x=count, quick=quick)  # fmt: skip
            first = Row(f"streams-first-{count}", "first event, p50 / its turn, if streams were served in order",
                        curve="first", x=count, quick=quick)  # fmt: skip
            fair = Row(f"streams-fair-{count}", "streams served per connection, max / min",
                       curve="fair", x=count, quick=quick)  # fmt: skip
            # Long enough that every connection has some streams.
            many_at_once: dict[str, Any] = {
                "connections": count,
                "seconds": max(effort.seconds, count / 128),
                "path": "/stream",
            }
            for i in range(rounds):
                floor, ours = await in_turn(
                    i,
                    partial(bare.load, body, **many_at_once),
                    partial(server.load, body, **many_at_once),
                )
                rates = [load.per_second * EVENTS for load in (ours, floor)]
                rate.add(rates[0] / rates[1], ours_rps=rates[0], floor_rps=rates[1])
                turn = count / ours.per_second
                ms = [seconds * 1e3 for seconds in (median(ours.firsts), turn, median(floor.firsts))]
                first.add(ms[0] / ms[1], ours_ms=ms[0], turn_ms=ms[1], fastapi_ms=ms[2])
                fair.add(max(ours.served) / max(min(ours.served), 1), max_n=max(ours.served), min_n=min(ours.served))
            rows += [rate, first, fair]
    for row in (burst, *sorted(rows, key=lambda row: row.curve)):
        yield row


PROGRAM = Program(
    name="streams",
    title="Streams",
    benches=(in_process, many),
    full=Effort(),
    quick=QUICK,
    quick_benches=(many,),
    rounds=3,
    quick_rounds=1,
    axis="streams at once",
    plots=(
        Plot("rate", "events a second of all streams", ("rate",), "ours_rps", "/s"),
        Plot("first", "first event of a stream, p50", ("first",), "ours_ms", "ms"),
    ),
    intro=f"A group works on one request at a time, so that streams wait for their turn; each has {EVENTS} updates without "
    "a pause. The floor works on all of them at once, in the server's own process.",
)
