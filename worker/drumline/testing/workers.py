"""Workers for tests and benches: each does one thing that a group must survive. Installed, so that ranks can import them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

from drumline.worker import DistributedWorker


class Echo(DistributedWorker):
    """Returns its payload."""

    def __call__(self, streaming: bool = False, **payload: Any) -> dict[str, Any]:
        """Return the payload."""
        return payload


class AsyncEcho(DistributedWorker):
    """Echo with coroutines everywhere."""

    async def setup(self, **kwargs: Any) -> None:
        """Keep the arguments."""
        await asyncio.sleep(0)
        self.kwargs = kwargs

    async def __call__(self, streaming: bool = False, **payload: Any) -> dict[str, Any]:
        """Return payload and setup arguments."""
        await asyncio.sleep(0)
        return {"payload": payload, "setup": self.kwargs}

    async def teardown(self) -> None:
        """Say so."""
        self.rank_print("torn down")


class Facts(DistributedWorker):
    """Returns what every rank sees of itself."""

    def setup(self, **kwargs: Any) -> None:
        """Draw one random number."""
        import random

        import torch

        self.kwargs = kwargs
        self.drawn = [torch.rand(1, dtype=torch.float64).item(), random.random()]  # noqa: S311

    def __call__(self, streaming: bool = False) -> dict[str, Any]:
        """Gather facts of all ranks on rank 0."""
        import torch.distributed as dist

        mine = {
            "rank": self.rank,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "device": str(self.device),
            "drawn": self.drawn,
            "backend": dist.get_backend(),
            "cwd": os.getcwd(),
            "kwargs": self.kwargs,
            "environment": {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
            "request_id": self.request.request_id,
            "headers": dict(self.request.headers),
            "main_thread": __import__("threading").current_thread() is __import__("threading").main_thread(),
        }
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine)
        return {"ranks": gathered}


class Steps(DistributedWorker):
    """Takes steps with a collective each, streams one update per step, stops at checkpoints."""

    def __call__(
        self, streaming: bool = False, steps: int = 10, seconds: float = 0.0, tag: str = "", collective: bool = True
    ) -> dict[str, Any]:
        """Run ``steps`` steps of ``seconds`` each."""
        import torch
        import torch.distributed as dist

        total = torch.zeros(1)
        for step in range(steps):
            self.checkpoint()
            one = torch.ones(1)
            if collective:
                dist.all_reduce(one)
            total += one
            if seconds:
                time.sleep(seconds)
            if streaming and self.rank == 0:
                self.add_streaming_result({"step": step, "tag": tag})
        return {"total": float(total), "tag": tag, "steps": steps}


class Fails(DistributedWorker):
    """Fails in the way and on the rank that the payload names."""

    def setup(self, fail_rank: int | None = None, how: str = "raise", collective: bool = False) -> None:
        """Fail during setup when asked to."""
        if fail_rank == self.rank:
            fail(how)
        if collective:
            import torch.distributed as dist

            dist.barrier()

    def __call__(
        self, streaming: bool = False, how: str = "", rank: int = 0, collective: bool = False, updates: int = 0, tag: str = ""
    ) -> dict[str, Any]:
        """Send ``updates`` updates, then fail on ``rank`` (-1: on all), before a collective if asked for."""
        for number in range(updates):
            if self.rank == 0:
                self.add_streaming_result({"number": number, "tag": tag})
        if how and rank in (self.rank, -1):
            fail(how)
        if collective:
            import torch.distributed as dist

            dist.barrier()
        return {"ok": True, "tag": tag}

    def teardown(self) -> None:
        """Fail when the environment says so."""
        how = os.environ.get("DRUMLINE_TEST_TEARDOWN", "")
        if how and self.rank == 1:
            fail(how)


class WorkerExploded(ValueError):
    """The error that :func:`fail` raises."""


def fail(how: str) -> None:
    """Fail: raise, exit, kill, stop, hang or segfault."""
    match how:
        case "raise":
            raise WorkerExploded("exploded on purpose")
        case "exit":
            sys.exit(7)
        case "_exit":
            os._exit(9)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            while True:
                time.sleep(3600)
        case "segfault":
            import ctypes

            ctypes.string_at(0)
        case _:
            raise ValueError(f"unknown way to fail: {how}")


class Sleeps(DistributedWorker):
    """Has no step boundaries."""

    def __call__(self, streaming: bool = False, seconds: float = 0.0, tag: str = "") -> dict[str, Any]:
        """Sleep, then say the tag."""
        time.sleep(seconds)
        return {"tag": tag}
