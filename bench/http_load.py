"""A small HTTP/1.1 load client: keep-alive connections that each send the next request when the last is answered.

It parses just enough (status, Content-Length or chunks of an event stream) to cost little beside any server, and it is
the same for the floor and for ours. Prints one JSON object. ``python -m bench.http_load --port 8080 --connections 32``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from typing import cast

import uvloop

from bench.http_bytes import head_of, post

_SENT = re.compile(rb'"sent_ns": ?(\d+)')


class Run:
    """What all connections share: the request, the clock and the counts."""

    def __init__(self, request: bytes, requests: int | None, seconds: float | None, warmup: float) -> None:
        self.request = request
        self.left = requests
        self.seconds = seconds
        self.warmup = warmup
        self.latencies: list[float] = []
        self.delays: list[float] = []
        self.firsts: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open = 0
        self.started = 0.0
        self.ended = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter() + self.warmup

    def answered(self, sent: float, now: float) -> bool:
        """Take one answer; return whether it counts."""
        if self.over.done() or sent < self.started:
            return False
        if self.seconds is not None and now > self.started + self.seconds:
            self.finish(self.started + self.seconds)
            return False
        self.latencies.append(now - sent)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self.finish(now)
        return True

    def finish(self, now: float, error: Exception | None = None) -> None:
        """End the run."""
        if not self.over.done():
            self.ended = now
            if error is None:
                self.over.set_result(None)
            else:
                self.over.set_exception(error)


class Connection(asyncio.Protocol):
    """One connection with one request in flight."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.served = 0
        self._buffer = b""
        self._left = 0
        self._stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def send(self) -> None:
        """Send the request."""
        self._sent = time.perf_counter()
        self._first = True
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        """Read an answer, whole or a part of it."""
        now = time.perf_counter()
        if self._left:  # a large body is counted, not kept
            self._body(len(data), now)
            return
        if self._buffer:
            data = self._buffer + data
        if self._stream:
            self._read_stream(data, now)
            return
        head = head_of(data)
        if head is None:
            self._buffer = data
            return
        self._buffer = b""
        if head.status != 200:
            self.run.finish(now, RuntimeError(f"answer: {data[:500]!r}"))
        elif head.length is None:
            self._stream = True
            self._read_stream(data[head.size :], now)
        else:
            self._left = head.length
            self._body(len(data) - head.size, now)

    def _body(self, size: int, now: float) -> None:
        self._left -= size
        if self._left <= 0:
            self._left = 0
            self._answered(now)

    def _read_stream(self, data: bytes, now: float) -> None:
        """Note the updates in ``data``; the empty chunk ends the answer."""
        clock = time.monotonic_ns()
        lines = data.split(b"\n")
        self._buffer = lines.pop()  # an unfinished line is looked at again, with the rest of it
        for line in lines:
            if line.startswith(b"data: ") and (sent := _SENT.search(line)):
                if self._first:
                    self._first = False
                    self.run.firsts.append(now - self._sent)
                self.run.delays.append((clock - int(sent[1])) / 1e9)
            elif line == b"event: error":
                self.run.finish(now, RuntimeError(f"the stream failed: {data[:500]!r}"))
            elif line == b"0\r":
                self._stream, self._buffer = False, b""
                self._answered(now)
                return

    def _answered(self, now: float) -> None:
        self.served += self.run.answered(self._sent, now)
        if not self.run.over.done():
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the run: nobody closes a connection before the end."""
        self.run.finish(time.perf_counter(), exc or ConnectionError("the server closed the connection"))


async def main() -> None:
    """Run the load and print what it saw."""
    parser = argparse.ArgumentParser(prog="python -m bench.http_load", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--body", default="{}")
    parser.add_argument("--pad", type=int, default=0, help="characters of a field `value` that is added to the body")
    parser.add_argument("--requests", type=int, help="end after so many answers")
    parser.add_argument("--seconds", type=float, help="end after so long")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds that are not counted")
    args = parser.parse_args()
    body = json.loads(args.body)
    if args.pad:
        body["value"] = "x" * args.pad
    request = post(args.path, json.dumps(body).encode())
    run = Run(request, args.requests, args.seconds, args.warmup)
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(run), "127.0.0.1", args.port) for _ in range(args.connections)
    ]
    connections = [protocol for _, protocol in made]
    run.begin()
    for connection in connections:
        connection.send()
    await asyncio.wait_for(run.over, args.warmup + (args.seconds or 120) + 30)
    for connection in connections:
        connection.transport.abort()
    result = {
        "latencies": run.latencies,
        "served": [connection.served for connection in connections],
        "seconds": run.ended - run.started,
        "delays": run.delays,
        "firsts": run.firsts,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    uvloop.run(main())
