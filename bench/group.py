"""drumline as the benches start it: a runner in this process, or ``drumline run``."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from bench.processes import Served, free_port
from drumline.distributed import DistributedRunner
from drumline.testing import bench_workers

RANKS = 2
Floor = TypeVar("Floor")
_QUIET = {"DRUMLINE_LOG_LEVEL": "warning", "DRUMLINE_DRAIN_DELAY": "0"}


async def in_turn(
    round_number: int, floor: Callable[[], Awaitable[Any]], ours: Callable[[], Awaitable[Any]]
) -> tuple[Any, Any]:
    """Run both, the floor first in even rounds; return what they returned."""
    gc.collect()
    if round_number % 2:
        our = await ours()
        return await floor(), our
    return await floor(), await ours()


@asynccontextmanager
async def running(worker: type, ranks: int = RANKS, **options: Any) -> AsyncIterator[DistributedRunner]:
    """Start a runner of CPU ranks and stop it; ``options`` are the runner's."""
    runner = DistributedRunner(worker, world_size=ranks, device="cpu", **options)
    await runner.start(timeout=120)
    try:
        yield runner
    finally:
        await runner.stop()


def start_server(worker: str, ranks: int = RANKS, **settings: str) -> Served:
    """Start ``drumline run`` with a worker of ``bench_workers``; ``settings`` are ``DRUMLINE_*`` in lower case."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("drumline")), "run", f"{bench_workers.__name__}:{worker}"]
    own = {f"DRUMLINE_{name.upper()}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [*command, "-n", str(ranks), "--device", "cpu", "--port", str(port)], env={**os.environ, **_QUIET, **own}
    )
    return Served(port, process)


@asynccontextmanager
async def serving(worker: str, ranks: int = RANKS, **settings: str) -> AsyncIterator[Served]:
    """Start a server (see :func:`start_server`), wait until it is ready, and stop it."""
    served = start_server(worker, ranks, **settings)
    try:
        await asyncio.to_thread(served.wait_until_up, served.process)
        yield served
    finally:
        await stop(served)


@asynccontextmanager
async def beside(
    floor: AbstractContextManager[Floor], worker: str, ranks: int = RANKS, **settings: str
) -> AsyncIterator[tuple[Floor, Served]]:
    """Start a server (see :func:`start_server`) and its floor at once; give both when both are ready."""
    served = start_server(worker, ranks, **settings)
    try:
        with floor as started:
            await asyncio.to_thread(served.wait_until_up, served.process)
            yield started, served
    finally:
        await stop(served)


async def stop(served: Served) -> None:
    """End a server in order; its ranks end with it."""
    served.process.terminate()
    await asyncio.to_thread(served.process.wait, 60)
