"""How long it takes until something can be served: a command, a group, a server, a group after a lost rank."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from bench import floors
from bench.group import RANKS, in_turn, running, start_server, stop
from bench.ours import REQUEST
from bench.program import Program
from bench.report import Row
from drumline.distributed import DistributedRunner
from drumline.testing import bench_workers


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    counts: tuple[int, ...] = (2, 8)


QUICK = Effort(counts=(2,))


async def starts(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """From nothing to ready: a group in process, a server's command, and the import of drumline."""
    del effort
    group = Row("start", "start() of a group to ready / import torch", 1.3)
    command = Row("start-server", "drumline run to ready over HTTP / import torch", 1.5)
    module = Row("start-import", "import drumline / start of an interpreter")

    async def ours() -> float:
        runner = DistributedRunner(bench_workers.Echo, world_size=RANKS, device="cpu")
        started = time.perf_counter()
        await runner.start(timeout=120)
        taken = time.perf_counter() - started
        await runner.stop()
        return taken

    async def server() -> float:
        started = time.perf_counter()
        served = start_server("Echo")
        try:
            await asyncio.to_thread(served.wait_until_up, served.process)
            return time.perf_counter() - started
        finally:
            await stop(served)

    async def floor(module: str = "torch") -> float:
        return await asyncio.to_thread(floors.import_seconds, module)

    if rounds > 1:
        await floor()  # reads the files once, for all
    for i in range(rounds):
        torch, taken = await in_turn(i, floor, ours)
        group.add(taken / torch, ours_s=taken, floor_s=torch)
        taken = await server()
        command.add(taken / torch, ours_s=taken, floor_s=torch)
        python, taken = await in_turn(i, partial(floor, "sys"), partial(floor, "drumline"))
        module.add(taken / python, ours_s=taken, floor_s=python)
    for row in (group, command, module):
        yield row


async def restarts(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """From SIGKILL of a rank until the new group is ready, beside forks that make a bare gloo group."""
    for count in effort.counts:
        goal = 0.3 if count == RANKS else None
        row = Row(f"restart-{count}", f"restart of {count} ranks after SIGKILL, trivial setup", goal, "s")
        row.quick = count in QUICK.counts
        ratio = Row(
            f"restart-ratio-{count}", f"the same / forking {count} processes into a bare gloo group", quick=row.quick
        )
        async with running(bench_workers.Echo, count) as runner:
            for i in range(rounds):
                floor, (ready, answered) = await in_turn(
                    i,
                    partial(asyncio.to_thread, floors.fork_seconds, count),
                    partial(_restart_seconds, runner, i % count),
                )
                row.add(ready, first_answer_s=answered)
                ratio.add(ready / floor, ours_s=ready, floor_s=floor)
        yield row
        yield ratio


async def _restart_seconds(runner: DistributedRunner, rank: int) -> tuple[float, float]:
    """Kill a rank; return the seconds until the new group is ready, and until it has answered."""
    await runner.invoke(REQUEST)  # without a request between, the next restart is held back
    status = runner.status
    pid = status.ranks[rank].pid
    assert pid is not None
    before = status.restarts
    started = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while status.state != "ready" or status.restarts == before:
        status = await runner.wait_status(status.version, 30)
    ready = time.perf_counter() - started
    await runner.invoke(REQUEST)
    return ready, time.perf_counter() - started


PROGRAM = Program(
    name="start",
    title="Start and restart",
    benches=(starts, restarts),
    full=Effort(),
    quick=QUICK,
    rounds=3,
    quick_rounds=1,
    intro="Torch is imported once, by the nursery, while the server comes up; ranks are forked from it, at a restart too.",
)
