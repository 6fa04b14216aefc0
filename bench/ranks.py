"""What one more rank costs: a request, requests of many callers, memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

from bench import floors
from bench.group import in_turn, running
from bench.ours import REQUEST, invoke_seconds
from bench.program import Plot, Program
from bench.report import Row
from drumline.distributed import DistributedRunner
from drumline.testing import bench_workers

CALLERS = 32
_MIB = 1 << 20


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    counts: tuple[int, ...] = (1, 2, 4, 8)
    calls: int = 2000
    seconds: float = 1.5


QUICK = Effort(counts=(4,), calls=300, seconds=0.4)


async def per_second(runner: DistributedRunner, seconds: float) -> float:
    """Return the requests a second of ``CALLERS`` tasks that call in a loop."""
    ends = time.perf_counter() + seconds

    async def caller() -> int:
        served = 0
        while time.perf_counter() < ends:
            await runner.invoke(REQUEST)
            served += 1
        return served

    started = time.perf_counter()
    served = await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return sum(served) / (time.perf_counter() - started)


async def groups(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Groups of several sizes, beside as many processes that echo on a socket pair each."""
    rows = []
    for count in effort.counts:
        quick = count in QUICK.counts
        call = Row(f"ranks-call-{count}", "no-op invoke p50 / socket pairs", curve="call", x=count, quick=quick)
        rate = Row(f"ranks-rate-{count}", "requests/s of 32 callers / one after another on socket pairs", at_least=True,
                   curve="rate", x=count, quick=quick)  # fmt: skip
        memory = Row(f"ranks-memory-{count}", "USS of a rank", unit="MiB", curve="memory", x=count, quick=quick)
        async with AsyncExitStack() as stack:
            echo = await stack.enter_async_context(floors.PairEcho(count))
            runner = await stack.enter_async_context(running(bench_workers.Echo, count))
            await invoke_seconds(runner, 200)
            for i in range(rounds):
                floor, ours = await in_turn(
                    i, partial(echo.seconds, effort.calls), partial(invoke_seconds, runner, effort.calls)
                )
                call.add(median(ours) / median(floor), ours_us=median(ours) * 1e6, floor_us=median(floor) * 1e6)
                served = await per_second(runner, effort.seconds)
                rate.add(served * median(floor), ours_rps=served, floor_rps=1 / median(floor))
                uss = [floors.memory_of(rank.pid)["uss"] / _MIB for rank in runner.status.ranks if rank.pid]
                memory.add(median(uss), most_MiB=max(uss))
        rows += [call, rate, memory]
    for row in sorted(rows, key=lambda row: row.curve):
        yield row


PROGRAM = Program(
    name="ranks",
    title="Over the number of ranks",
    benches=(groups,),
    full=Effort(),
    quick=QUICK,
    rounds=3,
    quick_rounds=1,
    axis="ranks",
    plots=(
        Plot("call", "no-op invoke over ranks, p50", ("call",), "ours_us", "µs"),
        Plot("rate", "requests a second of 32 callers over ranks", ("rate",), "ours_rps", "/s"),
    ),
    intro="Every rank gets every request. The floor is as many processes that block on a socket pair and send back what "
    "they get, awaited together on the same event loop.",
)
