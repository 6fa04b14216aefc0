"""What drumline costs: one bench per line of the table, each round beside its floor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

from bench import floors
from bench.group import beside, in_turn, running, serving
from bench.program import Program
from bench.report import Row
from drumline.distributed import DistributedRunner
from drumline.rank.updates import PREVIEW_QUALITY
from drumline.testing import bench_workers

CALLERS = 32
REQUEST = {"prompt": floors.PROMPT}
ZMQ_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    calls: int = 3000
    http_calls: int = 2000
    http_seconds: float = 3.0
    copies: int = 40
    events: int = 250
    firsts: int = 200
    pictures: int = 200
    caller_calls: int = 300


QUICK = Effort(
    calls=500, http_calls=300, http_seconds=1.0, copies=10, events=50, firsts=30, pictures=40, caller_calls=50
)


async def invoke_seconds(runner: DistributedRunner, count: int) -> list[float]:
    """Return the seconds of ``count`` requests one after another."""
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        await runner.invoke(REQUEST)
        taken.append(time.perf_counter() - started)
    return taken


async def invokes(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """No-op requests in process, over both channels, beside an awaited zmq echo."""
    pairs = Row("invoke", "no-op invoke p50 / awaited zmq.asyncio echo", 1.0)
    remote = Row("invoke-zmq", "the same over the ZeroMQ channel", 2.5)
    async with AsyncExitStack() as stack:
        echo = await stack.enter_async_context(floors.ZmqEcho())
        local, over_zmq = await asyncio.gather(
            stack.enter_async_context(running(bench_workers.Echo)),
            stack.enter_async_context(running(bench_workers.Echo, worker_addr=ZMQ_ADDRESS)),
        )
        for warm in (echo.seconds(200), invoke_seconds(local, 200), invoke_seconds(over_zmq, 200)):
            await warm
        for i in range(rounds):
            for row, runner in ((pairs, local), (remote, over_zmq)):
                floor, ours = await in_turn(
                    i, partial(echo.seconds, effort.calls), partial(invoke_seconds, runner, effort.calls)
                )
                row.add(median(ours) / median(floor), ours_us=median(ours) * 1e6, floor_us=median(floor) * 1e6)
    yield pairs
    yield remote


async def http(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """No-op requests over HTTP beside a bare FastAPI echo, and whether 32 connections are served alike."""
    one = Row("http", "HTTP invoke p50, 1 connection / bare FastAPI echo", 1.5)
    many = Row("http-rate", "HTTP requests/s, 32 connections / bare FastAPI echo", 0.6, at_least=True)
    tail = Row("http-tail", "32 connections: p99 / p50", 3.0)
    fair = Row("http-fair", "32 connections: served per connection, max / min", 1.1)
    async with beside(floors.BareFastAPI(), "Echo") as (bare, server):
        for i in range(rounds):
            floor, ours = await in_turn(
                i,
                lambda: bare.load(REQUEST, requests=effort.http_calls),
                lambda: server.load(REQUEST, requests=effort.http_calls),
            )
            us = [median(load.latencies) * 1e6 for load in (ours, floor)]
            one.add(us[0] / us[1], ours_us=us[0], floor_us=us[1])
            floor, ours = await in_turn(
                i,
                lambda: bare.load(REQUEST, connections=CALLERS, seconds=effort.http_seconds),
                lambda: server.load(REQUEST, connections=CALLERS, seconds=effort.http_seconds),
            )
            many.add(ours.per_second / floor.per_second, ours_rps=ours.per_second, floor_rps=floor.per_second)
            _add_callers(tail, fair, ours.latencies, ours.served)
    for row in (one, many, tail, fair):
        yield row


async def callers(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """32 tasks that call ``invoke`` in a loop."""
    tail = Row("callers-tail", "32 callers in process: p99 / p50", 3.0)
    fair = Row("callers-fair", "32 callers in process: served per caller, max / min", 1.1)
    async with running(bench_workers.Echo) as runner:
        await invoke_seconds(runner, 200)
        for _ in range(rounds):
            ends = time.perf_counter() + CALLERS * effort.caller_calls * 150e-6  # about that many calls each
            latencies: list[float] = []

            async def caller(ends: float = ends, latencies: list[float] = latencies) -> int:
                served = 0
                while (started := time.perf_counter()) < ends:
                    await runner.invoke(REQUEST)
                    latencies.append(time.perf_counter() - started)
                    served += 1
                return served

            served = await asyncio.gather(*(caller() for _ in range(CALLERS)))
            _add_callers(tail, fair, latencies, served)
    yield tail
    yield fair


def _add_callers(tail: Row, fair: Row, latencies: list[float], served: list[int]) -> None:
    p99 = sorted(latencies)[len(latencies) * 99 // 100]
    tail.add(p99 / median(latencies), p99_ms=p99 * 1e3, p50_ms=median(latencies) * 1e3)
    fair.add(max(served) / max(min(served), 1), max_n=max(served), min_n=min(served))


async def tensors(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """A result of 12 MiB, until it is a tensor in the caller's hands."""
    import torch

    row = Row("tensor", "12 MiB tensor result in process / shared-memory copy", 4.0)
    expected = torch.arange(12 << 18, dtype=torch.float32).reshape(bench_workers.TENSOR_SHAPE)

    async def ours() -> list[float]:
        taken = []
        for _ in range(effort.copies):
            started = time.perf_counter()
            result = await runner.invoke()
            taken.append(time.perf_counter() - started)
        if not torch.equal(result["image"], expected):
            raise RuntimeError("the tensor came back changed")
        return taken

    async def floor() -> list[float]:
        return floors.copy_seconds(effort.copies)

    async with running(bench_workers.Tensors) as runner:
        await ours()
        for i in range(rounds):
            floor_seconds, our_seconds = await in_turn(i, floor, ours)
            ms = [median(seconds) * 1e3 for seconds in (our_seconds, floor_seconds)]
            row.add(ms[0] / ms[1], ours_ms=ms[0], floor_ms=ms[1])
    yield row


async def streams(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """When updates arrive: the first of a request, and events paced 20 ms; in process and over HTTP."""
    first = Row("first-event", "first stream event in process, p50", 1.0, "ms")
    paced = Row("event-delay", "events paced 20 ms in process, p99 delay", 2.0, "ms")
    http_first = Row("http-first-event", "first stream event over HTTP, p50", 1.0, "ms")
    http_paced = Row("http-event-delay", "events paced 20 ms over HTTP, p99 delay", 2.0, "ms")
    pace = {"count": effort.events, "interval": 0.02}
    async with running(bench_workers.Streams) as runner, serving("Streams") as server:
        for _ in range(rounds):
            firsts = []
            for _ in range(effort.firsts):
                started = time.perf_counter()
                stream = runner.stream({"count": 1})
                await anext(stream)
                firsts.append(time.perf_counter() - started)
                async for _ in stream:
                    pass
            first.add(median(firsts) * 1e3, p99_ms=_p99(firsts) * 1e3)
            delays = [
                (time.monotonic_ns() - update["sent_ns"]) / 1e9
                async for update in runner.stream(pace)
                if "sent_ns" in update
            ]
            paced.add(_p99(delays) * 1e3, p50_ms=median(delays) * 1e3, max_ms=max(delays) * 1e3)
            load = await server.load({"count": 1}, path="/stream", requests=effort.firsts)
            http_first.add(median(load.firsts) * 1e3, p99_ms=_p99(load.firsts) * 1e3)
            load = await server.load(pace, path="/stream", requests=1, warmup=0)
            http_paced.add(_p99(load.delays) * 1e3, p50_ms=median(load.delays) * 1e3, max_ms=max(load.delays) * 1e3)
    for row in (first, paced, http_first, http_paced):
        yield row


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


async def previews(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Pictures as text events, beside one thread that encodes the same pictures at the same quality."""
    row = Row("previews", "1024x1024 preview events/s / one core's JPEG encoder", 0.9, at_least=True)
    row.note = f"JPEG quality {PREVIEW_QUALITY} on both sides"
    pictures = [bench_workers.picture(i) for i in range(4)]

    async def floor() -> float:
        return floors.jpegs_per_second(pictures, effort.pictures, PREVIEW_QUALITY)

    async def ours() -> float:
        seen = 0
        started = time.perf_counter()
        async for event in runner.stream({"count": effort.pictures}, as_text_events=True):
            seen += event.startswith(b"event: update")
        taken = time.perf_counter() - started
        if seen != effort.pictures:
            raise RuntimeError(f"{seen} of {effort.pictures} previews arrived")
        return seen / taken

    async with running(bench_workers.Previews) as runner:
        await ours()
        for i in range(rounds):
            encoded, sent = await in_turn(i, floor, ours)
            row.add(sent / encoded, ours_rps=sent, floor_rps=encoded)
    yield row


async def memory(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Memory of a rank with a trivial worker, over a process that has only imported torch."""
    del effort
    resident = Row("rss", "RSS of a rank over bare import torch", 15, "MiB")
    unique = Row("uss", "USS of a rank over bare import torch (below 0: shared)", 15, "MiB")
    mib = 1 << 20
    for _ in range(rounds):
        bare = await asyncio.to_thread(floors.torch_memory)
        async with running(bench_workers.Echo) as runner:
            await invoke_seconds(runner, 50)
            ranks = [floors.memory_of(rank.pid) for rank in runner.status.ranks if rank.pid]
        for row, name in ((resident, "rss"), (unique, "uss")):
            most = max(rank[name] for rank in ranks)
            row.add((most - bare[name]) / mib, ours_MiB=most / mib, floor_MiB=bare[name] / mib)
    yield resident
    yield unique


PROGRAM = Program(
    name="floors",
    title="Against the floors",
    benches=(invokes, http, tensors, streams, previews, callers, memory),
    full=Effort(),
    quick=QUICK,
    quick_benches=(invokes, previews),
    rounds=5,
)
