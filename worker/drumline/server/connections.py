"""uvicorn's HTTP connection, with the bounds that it leaves to others.

uvicorn with httptools closes idle connections after an answer, but waits for ever for a request's headers, takes any
number of them of any size, and reads for ever what is left of a body that was refused. Here all of that is bounded (see
``limits``).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from drumline import problems
from drumline.server import limits
from drumline.server.exchange import CONNECTION_KEY


class _HeadTooLargeError(Exception):
    pass


class _Parts:
    """Takes the place of a transport while a whole response is put together."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


class _Date:
    """The date header, made anew when a request comes in another second: an idle server has no clock to turn."""

    def __init__(self) -> None:
        self._second = 0
        self._headers: list[tuple[bytes, bytes]] = []

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the header of this second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._headers = [(b"date", formatdate(second, usegmt=True).encode())]
        return self._headers


_date = _Date()


class Connection(HttpToolsProtocol):
    """One client connection."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._in_head = False
        self._head_bytes = 0
        self._head_too_large = False
        self._deadline: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.on_lost: Callable[[], None] | None = None

    # -- the head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its request has to come."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Bytes arrived."""
        was_in_head = self._in_head
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        # The head is not complete yet. httptools keeps an unfinished header to itself, so bytes are counted, too.
        self._head_bytes += len(data) if was_in_head else 0
        if self._head_bytes > limits.MAX_HEAD_BYTES:
            self._head_too_large = True
            self.send_400_response("")
        elif self._deadline is None:
            self._arm()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()
        self.scope[CONNECTION_KEY] = self  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """The head is complete."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > limits.MAX_HEAD_BYTES or len(self.headers) > limits.MAX_HEADERS:
            self._head_too_large = True
            raise _HeadTooLargeError  # httptools makes it a parser error, and uvicorn that a send_400_response()
        self._in_head = False
        self._disarm()
        self.server_state.default_headers = _date.headers()
        super().on_headers_complete()

    @property
    def body_complete(self) -> bool:
        """Whether the whole body of the request in hand has arrived."""
        return not self.cycle.more_body

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    @contextlib.contextmanager
    def one_write(self) -> Iterator[None]:
        """Send what is answered meanwhile, a whole response, with one system call instead of two."""
        cycle = self.cycle
        if not cycle.keep_alive or cycle.disconnected:  # the connection is closed after the answer: keep that order
            yield
            return
        parts = _Parts()
        cycle.transport = parts  # type: ignore[assignment]  # uvicorn only writes to it here
        try:
            yield
        finally:
            cycle.transport = self.transport
            if parts.written:
                self.transport.write(b"".join(parts.written))

    def pause_writing(self) -> None:
        """The client does not take its answer as fast as it is made."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(limits.STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some."""
        _cancel(self._stall)
        self._stall = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, or one with too much of a head, and close."""
        suffix, text = "bad-request", "What was received is not an HTTP request."
        if self._head_too_large:
            suffix = "headers-too-large"
            text = f"Up to {limits.MAX_HEADERS} headers and {limits.MAX_HEAD_BYTES} bytes are taken."
        problem = problems.make(suffix, text, limits.request_id())
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.close()  # in the middle of another answer: nothing can be said
            return
        body = problem.body()
        headers = [
            *problem.headers(),
            ("x-request-id", problem.request_id),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        lines = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers)
        self.transport.write(STATUS_LINE[problem.status] + lines + b"\r\n" + body)
        self.transport.close()

    # -- the body of a request that was answered early

    def on_response_complete(self) -> None:
        """The answer was sent."""
        super().on_response_complete()
        if self.cycle.more_body and self._linger is None and not self.transport.is_closing():
            self._linger = self.loop.call_later(limits.LINGER_SECONDS, self.transport.close)

    def on_message_complete(self) -> None:
        """The request's body is complete."""
        _cancel(self._linger)
        self._linger = None
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle.more_body = False
        super().on_message_complete()

    # -- timers

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(limits.HEAD_SECONDS, self._too_slow)

    def _disarm(self) -> None:
        _cancel(self._deadline)
        self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        _cancel(self._linger)
        self._linger = None
        _cancel(self._stall)
        self._stall = None
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
