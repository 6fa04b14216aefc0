"""An open-loop load client: requests leave when their time has come, whether or not others were answered.

Arrivals are a Poisson process with a fixed seed. A latency counts from the time at which the request should have left, so
a client that is late counts as waiting. Prints one JSON object. ``python -m bench.open_load --port 8080 --rate 500``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import cast

import uvloop

from bench.http_bytes import head_of, post

_SEED = 7
_PATIENCE = 60.0


class Arrivals:
    """The requests of one run.

    Attributes:
        latencies: by status, seconds per answer in the order of the answers.
        over: done when the last request is answered.
    """

    def __init__(self, port: int, request: bytes, rate: float, seconds: float) -> None:
        self.request = request
        self.latencies: dict[int, list[float]] = {}
        self._port = port
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._unanswered = 0
        chance = random.Random(_SEED)
        self._times = []
        at = 0.0
        while (at := at + chance.expovariate(rate)) < seconds:
            self._times.append(at)
        self.count = len(self._times)
        self._next = 0

    async def connect(self, count: int) -> None:
        """Open connections before the clock starts."""
        for _ in range(count):
            _, connection = await self._loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
            self._idle.append(connection)

    def begin(self) -> None:
        """Start the clock."""
        self._started = self._loop.time()
        self._arrive()

    def _arrive(self) -> None:
        while self._next < self.count:
            due = self._started + self._times[self._next]
            if due > self._loop.time():
                self._loop.call_at(due, self._arrive)
                return
            self._next += 1
            self._unanswered += 1
            if self._idle:
                self._idle.pop().send(due)
            else:
                opening = self._loop.create_task(self._open(due))
                self._opening.add(opening)
                opening.add_done_callback(self._opening.discard)

    async def _open(self, due: float) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        except OSError as error:
            self.fail(error)
            return
        connection.send(due)

    def answered(self, connection: Connection, status: int, latency: float) -> None:
        """Take one answer."""
        self.latencies.setdefault(status, []).append(latency)
        self._idle.append(connection)
        self._unanswered -= 1
        if not self._unanswered and self._next == self.count and not self.over.done():
            self.over.set_result(None)

    def fail(self, error: Exception) -> None:
        """A connection broke: nothing that this client measures may do that."""
        if not self.over.done():
            self.over.set_exception(error)


class Connection(asyncio.Protocol):
    """One connection with at most one request in flight."""

    def __init__(self, run: Arrivals) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def send(self, due: float) -> None:
        """Send the request that was due then."""
        self._due = due
        self.transport.write(self._run.request)

    def data_received(self, data: bytes) -> None:
        """Read an answer, whole or a part of it."""
        self._data += data
        head = head_of(self._data)
        if head is None or head.length is None or len(self._data) < head.size + head.length:
            return
        self._data = b""
        self._run.answered(self, head.status, self._loop.time() - self._due)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the run."""
        self._run.fail(exc or ConnectionError("the server closed the connection"))


async def main() -> None:
    """Run the load and print what it saw."""
    parser = argparse.ArgumentParser(prog="python -m bench.open_load", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/")
    parser.add_argument("--body", default="{}")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, required=True, help="how long requests leave")
    parser.add_argument("--connections", type=int, default=128, help="opened beforehand; more are when they are needed")
    args = parser.parse_args()
    run = Arrivals(args.port, post(args.path, args.body.encode()), args.rate, args.seconds)
    await run.connect(args.connections)
    started = time.perf_counter()
    run.begin()
    await asyncio.wait_for(run.over, args.seconds + _PATIENCE)
    print(json.dumps({"sent": run.count, "seconds": time.perf_counter() - started, "latencies": run.latencies}))


if __name__ == "__main__":
    uvloop.run(main())
