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
import socket
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from bench.processes import Served, free_port

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


class PairEcho:
    """Processes that block on a socket pair each and send back what they get; awaited together, like ranks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._left = 0
        self._done: asyncio.Future[None]

    async def __aenter__(self) -> PairEcho:
        self._loop = asyncio.get_running_loop()
        self._sockets, self._processes = [], []
        for _ in range(self._count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "bench.floors", "pair", "--descriptor", str(theirs.fileno())]
            self._processes.append(await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()]))
            theirs.close()
            self._sockets.append(ours)
            self._loop.add_reader(ours, self._on_answer, ours)
        await self.seconds(1)
        return self

    def _on_answer(self, answered: socket.socket) -> None:
        answered.recv(4096)
        self._left -= 1
        if not self._left:
            self._done.set_result(None)

    async def seconds(self, count: int) -> list[float]:
        """Return the seconds of ``count`` round trips of 64 bytes with all of them, one after another."""
        taken = []
        body = PROMPT.encode()
        for _ in range(count):
            started = time.perf_counter()
            self._left, self._done = self._count, self._loop.create_future()
            for each in self._sockets:
                each.send(body)
            await self._done
            taken.append(time.perf_counter() - started)
        return taken

    async def __aexit__(self, *_: object) -> None:
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()
        for process in self._processes:
            await process.wait()


def _pair_peer(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as pair:
        while data := pair.recv(4096):
            pair.send(data)


class Gloo:
    """Forked processes that have made a ``gloo`` group and done nothing else: what torch itself costs while idle."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> int:
        command = [sys.executable, "-m", "bench.floors", "gloo", "--count", str(self._count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self._process.pid

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate(timeout=60)


def fork_seconds(count: int) -> float:
    """Return the seconds until ``count`` processes, forked from one that has imported torch, have made a group."""
    command = [sys.executable, "-m", "bench.floors", "gloo", "--count", str(count)]
    out = subprocess.run(command, check=True, input=b"", stdout=subprocess.PIPE, timeout=120).stdout
    return float(out)


def _gloo(count: int) -> None:
    """Fork ``count`` members, print the seconds until all have joined, and end when standard input does."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ready, ready_end = os.pipe()
        end, keep_on = os.pipe()
        for rank in range(count):
            if os.fork():
                continue
            os.close(keep_on)
            dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)  # type: ignore[attr-defined]  # exported at run time only
            os.write(ready_end, b".")
            os.read(end, 1)  # not standard input: who left at once would break off those that still connect to it
            os._exit(0)
        os.close(ready_end)
        joined = 0
        while joined < count:
            if not (signs := os.read(ready, count)):
                raise RuntimeError(f"{joined} of {count} processes made a group")
            joined += len(signs)
        print(time.perf_counter() - started, flush=True)
        sys.stdin.buffer.read()
        os.close(keep_on)
        for _ in range(count):
            os.wait()


class BareFastAPI:
    """FastAPI on uvicorn (uvloop, httptools) in its own process; one route that takes and returns a pydantic model."""

    def __enter__(self) -> Served:
        port = free_port()
        self._process = subprocess.Popen([sys.executable, "-m", "bench.bare_http", str(port)])
        http = Served(port, self._process)
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


def import_seconds(module: str = "torch") -> float:
    """Return the seconds from the start of an interpreter until it has imported ``module``."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", f"import {module}; print(flush=True)"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
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
    parser.add_argument("what", choices=["zmq", "memory", "pair", "gloo"])
    parser.add_argument("--address")
    parser.add_argument("--descriptor", type=int)
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    if args.what == "zmq":
        _zmq_peer(args.address)
    elif args.what == "pair":
        _pair_peer(args.descriptor)
    elif args.what == "gloo":
        _gloo(args.count)
    else:
        _print_memory()


if __name__ == "__main__":
    main()
