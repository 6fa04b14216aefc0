"""What is measured of each server, over HTTP, by the same client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median

import aiohttp
import psutil

from bench.floors import PROMPT
from bench.peers.contestants import Running

#: How long a server may take to serve again after one of its processes was killed.
_RECOVERY_SECONDS = 30.0
_FLIGHT_SECONDS = 1.0


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    requests: int = 1000
    seconds: float = 2.0
    values: int = 20
    events: int = 100
    burst: int = 3000


QUICK = Effort(requests=100, seconds=0.5, values=3, events=20, burst=300)


@dataclass(frozen=True)
class Measure:
    """One line of the table: a figure of a running server, None when nothing was answered in time.

    Attributes:
        unit: of the figure.
        more_is_better: which way is good.
    """

    key: str
    title: str
    unit: str
    take: Callable[[Running, Effort], Awaitable[float | None]]
    more_is_better: bool = False


async def _latency(server: Running, effort: Effort) -> float:
    load = await server.http.load(_body("noop"), path=server.contestant.path, requests=effort.requests)
    return median(load.latencies) * 1e6


def _rate(connections: int) -> Callable[[Running, Effort], Awaitable[float]]:
    async def take(server: Running, effort: Effort) -> float:
        load = await server.http.load(
            _body("noop"), path=server.contestant.path, connections=connections, seconds=effort.seconds
        )
        return load.per_second

    return take


async def _tail(server: Running, effort: Effort) -> float | None:
    load = await server.http.load(_body("noop"), path=server.contestant.path, connections=32, seconds=effort.seconds)
    if not load.latencies:
        return None
    return sorted(load.latencies)[len(load.latencies) * 99 // 100] * 1e3


def _value(kind: str) -> Callable[[Running, Effort], Awaitable[float]]:
    async def take(server: Running, effort: Effort) -> float:
        load = await server.http.load(_body(kind), path=server.contestant.path, requests=effort.values)
        return median(load.latencies) * 1e3

    return take


async def _first(server: Running, effort: Effort) -> float:
    load = await server.http.load({"count": 1}, path="/stream", requests=effort.values * 5)
    return median(load.firsts) * 1e3


async def _delay(server: Running, effort: Effort) -> float:
    load = await server.http.load({"count": effort.events, "interval": 0.02}, path="/stream", requests=1, warmup=0)
    return sorted(load.delays)[len(load.delays) * 99 // 100] * 1e3


async def _events(server: Running, effort: Effort) -> float:
    load = await server.http.load({"count": effort.burst}, path="/stream", requests=1, warmup=0)
    return len(load.delays) / load.seconds


MEASURES = (
    Measure("latency", "no-op, one connection, p50", "µs", _latency),
    Measure("rate-1", "no-op requests/s, 1 connection", "/s", _rate(1), more_is_better=True),
    Measure("rate-8", "no-op requests/s, 8 connections", "/s", _rate(8), more_is_better=True),
    Measure("rate-32", "no-op requests/s, 32 connections", "/s", _rate(32), more_is_better=True),
    Measure("rate-128", "no-op requests/s, 128 connections", "/s", _rate(128), more_is_better=True),
    Measure("tail-32", "no-op, 32 connections, p99", "ms", _tail),
    Measure("image", "1024x1024 picture as JPEG in JSON, p50", "ms", _value("image")),
    Measure("tensor", "array of 12 MiB in JSON, p50", "ms", _value("tensor")),
    Measure("first", "first event of a stream, p50", "ms", _first),
    Measure("delay", "events paced 20 ms, p99 delay", "ms", _delay),
    Measure("events", "events/s of one stream", "/s", _events, more_is_better=True),
)


def _body(kind: str) -> dict[str, object]:
    return {"kind": kind, "prompt": PROMPT}


@dataclass(frozen=True)
class Death:
    """What happened when the process that works for a request was killed.

    Attributes:
        answer: the HTTP status of the request in flight, or what became of it.
        told_s: seconds from the kill until its client knew; None: not within the limit.
        back_s: seconds from the kill until another request was served; None: not within the limit.
    """

    answer: str
    told_s: float | None
    back_s: float | None


async def death(server: Running) -> Death:
    """Kill the process that runs a request, and see what its clients see."""
    address = f"http://127.0.0.1:{server.http.port}{server.contestant.path}"
    limit = aiohttp.ClientTimeout(total=_RECOVERY_SECONDS)
    async with aiohttp.ClientSession(timeout=limit) as session:
        async with session.post(address, json=_body("pid")) as answer:
            victim = psutil.Process((await answer.json())["pid"])
        flight = asyncio.create_task(_post(session, address, {"kind": "sleep", "interval": _FLIGHT_SECONDS}))
        await asyncio.sleep(_FLIGHT_SECONDS / 2)  # the request is being worked on, whatever the server
        victim.kill()
        killed = time.perf_counter()
        flight.add_done_callback(lambda _: told.append(time.perf_counter() - killed))
        told: list[float] = []
        back: float | None = None
        while time.perf_counter() - killed < _RECOVERY_SECONDS:
            status = await _post(session, address, _body("noop"))
            if status == "200":
                back = time.perf_counter() - killed
                break
            await asyncio.sleep(0.02)  # another's server does not tell when it is back
        answered = await flight
    return Death(answered, told[0] if told and answered != "no answer" else None, back)


async def _post(session: aiohttp.ClientSession, address: str, body: dict[str, object]) -> str:
    """Return the status of a request, or what became of it."""
    try:
        async with session.post(address, json=body) as answer:
            await answer.read()
            return str(answer.status)
    except TimeoutError:
        return "no answer"
    except aiohttp.ClientError as error:
        return type(error).__name__
