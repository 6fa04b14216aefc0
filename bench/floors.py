"""The floors: what the same thing costs with nothing of drumline in it.

As a program it is a floor's other process: ``python -m bench.floors memory``.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from bench.processes import Http, free_port

PROMPT = "a sixty-four byte prompt, like the ones that people really write"


class ZmqEcho:
    """An awaited ``zmq.asyncio`` ROUTER and one blocking DEALER in another process that sends back what it gets."""

    async def __aenter__(self) -> ZmqEcho:
        import zmq
        import zmq.asyncio

        self._folder = tempfile.TemporaryDirectory()
        address = f"ipc://{self._folder.name}/s"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.floors", "zmq", "--address", address
        )
        self._peer, _ = await self._socket.recv_multipart()
        return self

    async def seconds(self, count: int) -> list[float]:
        """Return the seconds of ``count`` round trips of 64 bytes, one after another."""
        taken = []
        body = PROMPT.encode()
        for _ in range(count):
            started = time.perf_counter()
            await self._socket.send_multipart([self._peer, body])
            await self._socket.recv_multipart()
            taken.append(time.perf_counter() - started)
        return taken

    async def __aexit__(self, *_: object) -> None:
        self._process.kill()
        await self._process.wait()
        self._socket.close(0)
        self._context.term()
        self._folder.cleanup()


def _zmq_peer(address: str) -> None:
    import zmq

    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(address)
    socket.send(b"ready")
    while True:
        socket.send(socket.recv())


class BareFastAPI:
    """FastAPI on uvicorn (uvloop, httptools) in its own process; one route that takes and returns a pydantic model."""

    def __enter__(self) -> Http:
        port = free_port()
        self._process = subprocess.Popen([sys.executable, "-m", "bench.bare_http", str(port)])
        http = Http(port)
        http.wait_until_up(self._process)
        return http

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()


def copy_seconds(count: int, size: int = 12 << 20) -> list[float]:
    """Return the seconds of ``count`` copies of ``size`` bytes into touched shared memory."""
    import numpy as np

    source = np.arange(size // 8, dtype=np.uint64).view(np.uint8)
    with mmap.mmap(-1, size) as shared:
        target = np.frombuffer(shared, np.uint8)
        target[:] = 1  # the first touch of a page is not what is measured
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            target[:] = source
            taken.append(time.perf_counter() - started)
        del target
    return taken


def jpegs_per_second(pictures: list[Any], count: int, quality: int) -> float:
    """Return how many JPEG files a second one thread makes of ``pictures``."""
    started = time.perf_counter()
    for i in range(count):
        pictures[i % len(pictures)].save(io.BytesIO(), "JPEG", quality=quality)
    return count / (time.perf_counter() - started)


def import_seconds() -> float:
    """Return the seconds from the start of an interpreter until it has imported torch."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", "import torch; print(flush=True)"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - started


def torch_memory() -> dict[str, int]:
    """Return ``rss`` and ``uss`` (bytes) of a process that has imported torch and done nothing else."""
    out = subprocess.run(
        [sys.executable, "-m", "bench.floors", "memory"], check=True, stdout=subprocess.PIPE, timeout=120
    ).stdout
    memory: dict[str, int] = json.loads(out)
    return memory


def _print_memory() -> None:
    import torch  # noqa: F401  # what is measured

    print(json.dumps(memory_of(os.getpid())))


def memory_of(pid: int) -> dict[str, int]:
    """Return ``rss`` and ``uss`` (bytes) of a process.

    ``rss`` counts pages that are shared with others; ``uss`` only those that would go with this process.
    """
    import psutil

    full = psutil.Process(pid).memory_full_info()
    return {"rss": full.rss, "uss": full.uss}


def main() -> None:
    """Be a floor's other process."""
    parser = argparse.ArgumentParser(prog="python -m bench.floors", description=main.__doc__)
    parser.add_argument("what", choices=["zmq", "memory"])
    parser.add_argument("--address")
    args = parser.parse_args()
    if args.what == "zmq":
        _zmq_peer(args.address)
    else:
        _print_memory()


if __name__ == "__main__":
    main()
