"""uvicorn's HTTP connection, with the bounds that it leaves to others.

uvicorn with httptools closes idle connections after an answer, but waits for ever for a request's headers, takes any
number of them of any size, before a body and after it, any number of requests at a time, and reads for ever what is left
of a body that was refused. Here all of that is bounded (see ``limits``), and what two parsers may read differently is
refused: a proxy in front must see the same requests as we do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from drumline import problems
from drumline.problems import Problem
from drumline.server import date_header, limits
from drumline.server.connection_limit import ConnectionLimit
from drumline.server.exchange import CONNECTION_KEY, Receive, Scope, Send

log = logging.getLogger("drumline.server")

#: Sent twice, one of them would be overlooked by somebody between the client and us, or by us.
_ONCE = frozenset({b"host", b"authorization", b"x-api-key", b"content-type", b"content-length", b"transfer-encoding"})
_UPGRADE = frozenset({b"upgrade", b"http2-settings"})

Begin = Callable[[Scope, Receive, Send, bytes], bool]


class _RefusedHeadError(Exception):
    """Ends the parser: nothing that follows on this connection is read."""


class Connection(HttpToolsProtocol):
    """One client connection; ``limit`` decides who leaves when there are too many.

    ``begin`` is offered a request whose whole body came with its head, and tells whether it has taken it: then it needs no
    task. It is given scope, receive and send as an ASGI application is, and the body.
    """

    def __init__(self, limit: ConnectionLimit, begin: Begin, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._limit = limit
        self._begin = begin
        self._running: RequestResponseCycle | None = None
        self._reading = False
        self._unbegun: Any = None
        self._in_head = False
        self._head_bytes = 0
        self._new_head = False
        self._bodiless_bytes = 0
        self._waiting_bytes = 0
        self._refusal: Problem | None = None
        self._deaf = False
        self._deadline: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self.on_lost: Callable[[], None] | None = None

    # -- the head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its request has to come."""
        super().connection_made(transport)
        self._arm()
        self._limit.opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes arrived."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        self._new_head = False
        self._bodiless_bytes += len(data)
        self._feed(data)
        if self._deaf or self.transport.is_closing():
            return
        self._read_ahead(len(data))
        if self._in_head:
            # httptools keeps an unfinished header to itself, so bytes are counted, too.
            self._head_bytes += 0 if self._new_head else len(data)
            if self._head_bytes > limits.MAX_HEAD_BYTES:
                self._refuse(_too_large())
                return
        elif self.cycle is not None and self.cycle.more_body:
            if self._bodiless_bytes > limits.MAX_HEAD_BYTES:
                self._refuse(_too_large())
            return
        elif self.cycle is not None and not self.cycle.response_complete:
            return
        if self._deadline is None:
            self._arm()

    def _read_ahead(self, size: int) -> None:
        """Go on reading although requests wait, up to a number of bytes: who does not read sees no client leave."""
        if not self.pipeline:
            self._waiting_bytes = 0
            return
        self._waiting_bytes += size
        if self._waiting_bytes <= limits.MAX_WAITING_BYTES:
            self.flow.resume_reading()  # uvicorn stops with the first request that has to wait

    def _feed(self, data: bytes) -> None:
        self._reading = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            log.debug("not HTTP, from %s: %s", self.client, error)
            refusal = self._refusal
            self._refuse(refusal or problems.make("bad-request", "What was received is not an HTTP request."))
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        finally:
            self._reading = False
            if self._unbegun is not None:  # the rest of its body is still to come
                self._begin_task()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = self._new_head = True
        self._head_bytes = 0
        super().on_message_begin()
        self.scope[CONNECTION_KEY] = self  # type: ignore[typeddict-unknown-key]

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete; those after a body (trailers) say nothing to us, and must not pass for the others."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        refusal = self._judged()
        if refusal is not None:
            self._refusal = refusal
            raise _RefusedHeadError  # httptools makes it a parser error
        if self.parser.should_upgrade():
            return  # see _decline
        self._in_head = False
        self._bodiless_bytes = 0
        self._disarm()
        self.server_state.default_headers = date_header.headers()
        super().on_headers_complete()

    def _judged(self) -> Problem | None:
        """Why the head that has arrived is refused, if it is."""
        headers = self.headers
        size = len(self.url) + sum([len(name) + len(value) for name, value in headers])
        if size > limits.MAX_HEAD_BYTES or len(headers) > limits.MAX_HEADERS:
            return _too_large()
        names = [name for name, _ in headers]
        found = set(names)
        if len(names) != len(found):
            for name in sorted(found & _ONCE):
                if names.count(name) > 1:
                    return problems.make("bad-request", f"The header {name.decode()} was sent twice; send it once.")
        if self.parser.get_method() == b"CONNECT":
            return problems.make("bad-request", "This is no proxy: CONNECT is not served.")
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            return problems.make("bad-request", "Of HTTP only versions 1.1 and 1.0 are served here.")
        if b"host" not in found and version == "1.1":
            return problems.make("bad-request", "HTTP/1.1 needs a Host header.")
        if b"transfer-encoding" in found:
            value = dict(headers)[b"transfer-encoding"]
            if value.strip().lower() != b"chunked" or version != "1.1":
                return problems.make("bad-request", "Of transfer encodings only chunked is taken, and with HTTP/1.1.")
        if len(self.pipeline) >= limits.MAX_PIPELINED:
            return problems.make("bad-request", f"Up to {limits.MAX_PIPELINED} requests may wait on a connection.")
        return None

    def _decline(self, rest: bytes) -> None:
        """Go on in HTTP/1.1: an upgrade is an offer, which a server may ignore.

        The parser takes all that follows such a head for another protocol, also the body. So the request is read once
        more without the offer. (Java's HTTP client makes it with every first request.)
        """
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() not in _UPGRADE]
                lines += [b"connection: " + b",".join(kept)] if kept else []
            elif name not in _UPGRADE:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._unbegun = app
        if not self._reading:  # its body may be in what is being read
            self._begin_task()

    def _begin_task(self) -> None:
        app, self._unbegun = self._unbegun, None
        assert self._running is not None
        super()._start_asgi_task(self._running, app)

    def _begun(self, cycle: RequestResponseCycle) -> bool:
        """Whether the request, which is complete, was taken without a task."""
        if len(cycle.body) > limits.AT_ONCE_BYTES or cycle.waiting_for_100_continue:
            return False
        body, cycle.body = cycle.body, bytearray()
        asgi: Any = cycle  # uvicorn has types of its own for these three
        if self._begin(asgi.scope, asgi.receive, asgi.send, bytes(body)):
            return True
        cycle.body = body
        return False

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Give the request in hand, which was begun without a task, one.

        Args:
            work: what is left to do.
        """
        assert self._running is not None
        super()._start_asgi_task(self._running, lambda *_: work)

    @property
    def body_complete(self) -> bool:
        """Whether the whole body of the request in hand has arrived."""
        return not self.cycle.more_body

    def hold(self) -> None:
        """The request in hand is admitted (see ``connection_limit``)."""
        self._limit.hold(self)

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def answer(self, status: int, headers: bytes, body: bytes) -> bool:
        """Send a whole response with one system call, past the checks that uvicorn makes of every header.

        Args:
            status: of the response.
            headers: as on the wire, each with its line end; ``content-length`` is among them. The date is added.
            body: of that length.

        Returns:
            Whether it was sent. If not, nothing was, and uvicorn has to do it: it also waits for slow clients, closes
            connections that are not kept, and knows those that are gone.
        """
        cycle = self._running or self.cycle
        if not cycle.keep_alive or cycle.disconnected or cycle.response_started or self.flow.write_paused:
            return False
        self.transport.write(b"".join((STATUS_LINE[status], date_header.line(), headers, b"\r\n", body)))
        # What uvicorn's own `send` leaves behind.
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        cycle.on_response()
        cycle.on_response = _nothing  # or it would keep the connection, which keeps it
        return True

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

    def _refuse(self, problem: Problem) -> None:
        """Answer what is not taken, once all that was asked before is answered, and close. Nothing more is read."""
        self._deaf = True
        running = self._running
        if self.cycle is not None and self.cycle.more_body and self.cycle.response_complete:
            self.transport.close()  # the rest of a request that is answered already
            return
        if running is not None and not running.response_complete:
            last = running
            if self.pipeline:
                if self.cycle.more_body:  # what is refused is the rest of the newest request
                    self.pipeline.popleft()
                last = self.pipeline[0][0] if self.pipeline else running
            if last is not self.cycle or not last.more_body:
                # Answers come in the order of the requests, so the refusal is that the connection ends after them.
                last.keep_alive = False
                return
            if running.response_started:
                self.transport.close()  # in the middle of this request's answer: nothing can be said
                return
        problem = replace(problem, request_id=limits.request_id())
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

    def on_body(self, body: bytes) -> None:
        """A part of the body arrived."""
        self._bodiless_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """The answer was sent."""
        self._limit.release(self)
        answered = self._running
        super().on_response_complete()
        if answered is not self.cycle or self.transport.is_closing():
            return
        if self.cycle.more_body and self._linger is None:
            self._linger = self.loop.call_later(limits.LINGER_SECONDS, self.transport.close)

    def on_message_complete(self) -> None:
        """The request's body is complete."""
        if self._in_head:
            return  # of an offer to upgrade: its body comes when the offer is declined
        _cancel(self._linger)
        self._linger = None
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle.more_body = False
        super().on_message_complete()
        if self._unbegun is not None:
            if self._begun(self.cycle):
                self._unbegun = None
            else:
                self._begin_task()

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
        self._limit.closed(self)
        self._disarm()
        _cancel(self._linger)
        self._linger = None
        _cancel(self._stall)
        self._stall = None
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:  # uvicorn tells the newest request only
            self._running.disconnected = True
            self._running.message_event.set()
        if self.on_lost is not None:
            self.on_lost()


def _nothing() -> None:
    pass


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _too_large() -> Problem:
    text = f"Up to {limits.MAX_HEADERS} headers and {limits.MAX_HEAD_BYTES} bytes are taken."
    return problems.make("headers-too-large", text)
