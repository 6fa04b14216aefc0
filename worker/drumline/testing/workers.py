"""Workers for tests and benches: each does one thing that a group must survive. Installed, so that ranks can import them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
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
        import torch
        import torch.distributed as dist

        mine = {
            "rank": self.rank,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "device": str(self.device),
            "drawn": self.drawn,
            "backend": dist.get_backend(),
            "threads": torch.get_num_threads(),
            "cwd": os.getcwd(),
            "kwargs": self.kwargs,
            "environment": {
                k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            },
            "request_id": self.request.request_id,
            "headers": dict(self.request.headers),
            "deadline": self.request.deadline,
            "main_thread": threading.current_thread() is threading.main_thread(),
        }
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine)
        return {"ranks": gathered}


class Steps(DistributedWorker):
    """Takes steps with a collective each, streams one update per step, stops at checkpoints.

    Its result depends on every collective: one that pairs wrongly, or a request that left something behind, shows.
    """

    def __call__(
        self,
        streaming: bool = False,
        steps: int = 10,
        seconds: float = 0.0,
        tag: str = "",
        collective: bool = True,
        boundaries: bool = True,
        every_rank: bool = False,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Run ``steps`` steps of ``seconds`` each; without ``boundaries`` nothing can interrupt them."""
        import torch
        import torch.distributed as dist

        state = torch.rand(64, generator=torch.Generator().manual_seed(seed * 1000 + self.rank))
        for step in range(steps):
            if boundaries:
                self.checkpoint()
            mean = state.clone()
            if collective:
                dist.all_reduce(mean)
            state = torch.sin(state + mean / self.world_size)
            if seconds:
                time.sleep(seconds)
            if streaming and (every_rank or self.rank == 0):
                self.add_streaming_result({"step": step, "tag": tag, "rank": self.rank})
        return {"state": state, "tag": tag, "steps": steps}


class Fails(DistributedWorker):
    """Fails in the way and on the rank that the payload names."""

    def setup(
        self,
        fail_rank: int | None = None,
        how: str = "raise",
        collective: bool = False,
        fuse: str = "",
        teardown: str = "",
        teardown_rank: int = 1,
    ) -> None:
        """Fail during setup when asked to.

        Args:
            fail_rank: the rank that fails.
            how: see :func:`fail`.
            collective: the other ranks wait for it in a barrier.
            fuse: file that may hold ``RANK HOW``: that rank removes the file and fails, so that the next setup works.
            teardown: how ``teardown()`` fails.
            teardown_rank: where.
        """
        self._teardown = (teardown, teardown_rank)
        if fail_rank == self.rank:
            fail(how)
        if fuse:
            with contextlib.suppress(FileNotFoundError), open(fuse) as file:
                rank, _, kind = file.read().partition(" ")
                if rank == str(self.rank):
                    os.unlink(fuse)
                    fail(kind)
        if collective:
            import torch.distributed as dist

            dist.barrier()

    def __call__(
        self,
        streaming: bool = False,
        how: str = "",
        rank: int = 0,
        collective: bool = False,
        updates: int = 0,
        tag: str = "",
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
        """Fail when ``setup`` was told so."""
        how, rank = self._teardown
        if how and self.rank == rank:
            fail(how)


class WorkerExploded(ValueError):
    """The error that :func:`fail` raises."""


def fail(how: str) -> None:
    """Fail: raise, exit, _exit, kill, stop, hang, segfault; or leave a child process behind."""
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
        case "child":
            subprocess.Popen(["/bin/sleep", "3600"])  # nobody will wait for it
        case _:
            raise ValueError(f"unknown way to fail: {how}")


class Talks(DistributedWorker):
    """Writes lines in every way there is, each with the rank and the tag of the request."""

    def __call__(self, streaming: bool = False, tag: str = "", lines: int = 1, how: str = "print") -> dict[str, Any]:
        """Write ``lines`` lines."""
        for number in range(lines):
            talk(how, f"{tag} rank={self.rank} line={number}", self)
        return {"tag": tag}


def talk(how: str, text: str, worker: DistributedWorker) -> None:
    """Write ``text`` in one of many ways; ``stdio`` is C's own, ``unfinished`` has no line end."""
    match how:
        case "print":
            print(text)  # noqa: T201
        case "rank_print":
            worker.rank_print(text)
        case "warning":
            warnings.warn(text, stacklevel=1)
        case "logging":
            logging.getLogger("some.library").error(text)
        case "traceback":
            try:
                raise WorkerExploded(text)
            except WorkerExploded:
                traceback.print_exc()
        case "descriptor":
            os.write(2, text.encode() + b"\n")
        case "stdio":
            import ctypes

            ctypes.CDLL(None).puts(text.encode())
        case "child":
            subprocess.run(["/bin/echo", text], check=True)  # noqa: S603
        case "unfinished":
            print(text, end="")  # noqa: T201
        case "debug":
            worker.rank_print(text, debug=True)
        case "segfault":
            print(text)  # noqa: T201
            fail("segfault")
        case "thread":
            thread = threading.Thread(target=print, args=(text,))
            thread.start()
            thread.join()
        case _:
            raise ValueError(f"unknown way to talk: {how}")


class Sleeps(DistributedWorker):
    """Has no step boundaries."""

    def __call__(self, streaming: bool = False, seconds: float = 0.0, tag: str = "") -> dict[str, Any]:
        """Sleep, then say the tag."""
        time.sleep(seconds)
        return {"tag": tag}
