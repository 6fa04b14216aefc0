"""What a value costs over its size, in and out, beside a copy of it, a bare FastAPI route, a JPEG encoder."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import floors
from bench.group import beside, in_turn, running
from bench.processes import Http
from bench.program import Plot, Program
from bench.report import Row
from drumline.codec import RESULT_QUALITY
from drumline.distributed import DistributedRunner
from drumline.testing import bench_workers

_KIB, _MIB = 1 << 10, 1 << 20
_KINDS = ("array", "tensor", "image")


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round: for each size as many calls as make up ``volume`` bytes, within bounds."""

    sizes: tuple[int, ...] = (
        64, _KIB, 16 * _KIB, 64 * _KIB, 256 * _KIB, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB, 200 * _MIB
    )  # fmt: skip
    volume: int = 200 * _MIB
    least: int = 2
    most: int = 300

    def calls(self, size: int) -> int:
        """Return how often a value of ``size`` bytes is sent in one round."""
        return max(self.least, min(self.most, self.volume // size))


QUICK = Effort(sizes=(64 * _KIB, 4 * _MIB), volume=40 * _MIB, most=50)

Seconds = Callable[[int], Awaitable[list[float]]]
"""Takes a number of calls, returns the seconds of each."""


async def _measure(row: Row, round_number: int, count: int, floor: Seconds, ours: Seconds) -> None:
    floor_seconds, our_seconds = await in_turn(round_number, lambda: floor(count), lambda: ours(count))
    ms = [median(seconds) * 1e3 for seconds in (our_seconds, floor_seconds)]
    row.add(ms[0] / ms[1], ours_ms=ms[0], floor_ms=ms[1])


def _row(curve: str, title: str, size: int) -> Row:
    return Row(f"sizes-{curve}-{size}", title, curve=curve, x=size, quick=size in QUICK.sizes)


async def in_process(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """Arrays, tensors and images in process, in and out, beside one copy into shared memory."""
    rows: dict[str, list[Row]] = {}
    async with running(bench_workers.Values) as runner:
        for size in effort.sizes:
            count = effort.calls(size)
            for kind in _KINDS:
                value = bench_workers.value_of(kind, size)
                for way, payload in (("in", {"value": value}), ("out", {"kind": kind, "size": size})):
                    row = _row(f"{kind}-{way}", f"{kind} {way}, in process / one copy", size)
                    for i in range(rounds + 1):
                        if i == 0:  # the first calls make the value, and its memory
                            await _invokes(runner, payload)(3)
                            continue
                        await _measure(row, i, count, _copies(size), _invokes(runner, payload))
                    rows.setdefault(row.curve, []).append(row)
                await runner.invoke({})  # the worker and the pool keep no large value while the next is measured
    for curve in rows.values():
        for row in curve:
            yield row


def _invokes(runner: DistributedRunner, payload: dict[str, Any]) -> Seconds:
    async def seconds(count: int) -> list[float]:
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            result = await runner.invoke(payload)
            taken.append(time.perf_counter() - started)
            del result
        return taken

    return seconds


def _copies(size: int) -> Seconds:
    async def seconds(count: int) -> list[float]:
        return floors.copy_seconds(count, -(-size // 8) * 8)

    return seconds


async def over_http(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """JSON texts over HTTP, in and out, beside a bare FastAPI route; images as JPEG, beside one thread's encoder."""
    texts_in, texts_out, images = [], [], []
    async with beside(floors.BareFastAPI(), "Values", max_body_bytes=str(2 * max(effort.sizes))) as (bare, server):
        for size in effort.sizes:
            count = effort.calls(size)
            into = _row("json-in", "JSON in, over HTTP / a bare FastAPI route", size)
            out = _row("json-out", "JSON out, over HTTP / a bare FastAPI route", size)
            jpeg = _row("jpeg-out", "image out as JPEG, over HTTP / encoding it in this process", size)
            picture = bench_workers.value_of("image", size)
            for i in range(rounds):
                await _measure(into, i, count, _posts(bare, {}, "/value", size), _posts(server, {}, "/", size))
                body = {"size": size}
                await _measure(out, i, count, _posts(bare, body, "/value"), _posts(server, {"kind": "text", **body}))
                few = min(count, 10) if size < effort.volume else 2
                await _measure(jpeg, i, few, _encodings(picture), _posts(server, {"kind": "image", **body}))
            texts_in.append(into)
            texts_out.append(out)
            images.append(jpeg)
    for row in (*texts_in, *texts_out, *images):
        yield row


def _posts(http: Http, body: dict[str, Any], path: str = "/", pad: int = 0) -> Seconds:
    async def seconds(count: int) -> list[float]:
        # One more than is counted: the first answer makes the value.
        load = await http.load(body, path=path, requests=count + 1, warmup=0, pad=pad)
        return load.latencies[1:]

    return seconds


def _encodings(picture: Any) -> Seconds:
    def encode(count: int) -> list[float]:
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=RESULT_QUALITY)
            base64.b64encode(file.getvalue())
            taken.append(time.perf_counter() - started)
        return taken

    async def seconds(count: int) -> list[float]:
        return await asyncio.to_thread(encode, count)

    return seconds


PROGRAM = Program(
    name="sizes",
    title="Over the size of a value",
    benches=(in_process, over_http),
    full=Effort(),
    quick=QUICK,
    rounds=3,
    quick_rounds=1,
    axis="size",
    axis_bytes=True,
    plots=(
        Plot("in-process-in", "a value in, in process", ("array-in", "tensor-in", "image-in"), "ours_ms", "ms"),
        Plot("in-process-out", "a value out, in process", ("array-out", "tensor-out", "image-out"), "ours_ms", "ms"),
        Plot("json", "a JSON text over HTTP", ("json-in", "json-out"), "ours_ms", "ms"),
        Plot("jpeg", "an image out as JPEG, over HTTP", ("jpeg-out",), "ours_ms", "ms"),
    ),
    intro="One request at a time, two ranks, of which both get what goes in. The size of an image is that of its pixels.",
)
