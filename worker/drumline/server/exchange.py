"""One HTTP request and its response: ids, headers, what was sent, how it ended. Every response leaves through it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from dataclasses import replace
from typing import Any, Final, Protocol

from drumline.problems import Problem
from drumline.runner.ticket import Ticket
from drumline.server import limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Where FastAPI's handlers find the exchange in the ASGI scope, and where the exchange finds its connection.
SCOPE_KEY: Final = "drumline.exchange"
CONNECTION_KEY: Final = "drumline.connection"

_JSON_HEAD = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
_access = logging.getLogger("drumline.access")


class ClientGoneError(Exception):
    """The client went away: there is nobody to answer."""


class Transport(Protocol):
    """What a connection does for its exchange (see ``connections``); absent under other ASGI servers."""

    on_lost: Callable[[], None] | None
    """Called when the client is gone."""

    @property
    def body_complete(self) -> bool:
        """The whole body has arrived: reading it takes no time."""

    def hold(self) -> None:
        """The request is admitted; raises a 503 when too many connections are in use."""

    def abort(self) -> None:
        """Cut the connection, with whatever is still unsent."""

    def answer(self, status: int, headers: bytes, body: bytes) -> bool:
        """Send a whole response with one system call; False: nothing was sent, and ASGI has to do it."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Give a request that was begun without a task one."""


class Exchange:
    """State of one request.

    Attributes:
        request_id: taken over from the client when it is a sane token.
        caller: who is asking, for the fair queue.
        outcome: ``ok`` or a problem's suffix.
        queue_wait: seconds in the runner's queue, all tickets of this exchange together; None without one.
        run_time: seconds on the ranks, likewise.
        tickets: how many requests reached a runner.
        running: those that are not over, of an App's endpoint.
        failure: the error that a response was already made from.
        complete: the whole response was sent.
        body_bytes: how many bytes the server's budget counts for its body.
        is_call: an invocation, not a health check or another reserved route.
    """

    __slots__ = (
        "_receive",
        "_send",
        "began",
        "body_bytes",
        "caller",
        "complete",
        "connection",
        "failure",
        "headers",
        "is_call",
        "method",
        "outcome",
        "path",
        "queue_wait",
        "request_id",
        "run_time",
        "running",
        "scope",
        "sent_bytes",
        "started",
        "status",
        "tickets",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.connection: Transport | None = scope.get(CONNECTION_KEY)
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = limits.request_id(self.headers.get(b"x-request-id"), self.headers.get(b"x-fal-request-id"))
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.caller = ""
        self.is_call = False
        self.status = 0
        self.started = False
        self.sent_bytes = 0
        self.outcome = ""
        self.queue_wait: float | None = None
        self.run_time: float | None = None
        self.tickets = 0
        self.running: set[Ticket] = set()
        self.failure: BaseException | None = None
        self.complete = False
        self.body_bytes = 0
        self.began = time.perf_counter()

    @property
    def client(self) -> str:
        """The client's address without its port."""
        client = self.scope.get("client")
        return str(client[0]) if client else "unknown"

    @property
    def body_complete(self) -> bool:
        """The whole body is known to have arrived."""
        return self.connection is not None and self.connection.body_complete

    async def receive(self) -> Message:
        """Return the next ASGI message of the request."""
        return await self._receive()

    async def send(self, message: Message) -> None:
        """Send an ASGI message of a response made elsewhere (FastAPI), with our request id added."""
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            own = (b"x-request-id", self.request_id.encode())
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*kept, own]}
        else:
            self.sent_bytes += len(message.get("body", b""))
        await self._deliver(message)

    async def start(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Send status and headers."""
        self.started = True
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        raw.append((b"x-request-id", self.request_id.encode()))
        await self._deliver({"type": "http.response.start", "status": status, "headers": raw})

    async def part(self, data: bytes) -> None:
        """Send a piece of the body, waiting until the client has taken enough of what came before."""
        for begin in range(0, len(data), limits.CHUNK_BYTES):
            piece = data if len(data) <= limits.CHUNK_BYTES else data[begin : begin + limits.CHUNK_BYTES]
            self.sent_bytes += len(piece)
            await self._deliver({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """Send the end of the body."""
        await self._deliver({"type": "http.response.body", "body": b"", "more_body": False})

    async def json(self, body: bytes, status: int = 200, content_type: str = "application/json") -> None:
        """Send a whole response."""
        if content_type != "application/json" or not self.json_at_once(body, status):
            await self.respond(status, [("content-type", content_type)], body)

    def json_at_once(self, body: bytes, status: int = 200) -> bool:
        """Send a whole response without waiting; False: nothing was sent, and :meth:`json` has to do it."""
        if self.connection is None or len(body) > limits.CHUNK_BYTES:
            return False
        if not self.connection.answer(status, _JSON_HEAD % (len(body), self.request_id.encode()), body):
            return False
        self.started = self.complete = True
        self.status = status
        self.sent_bytes = len(body)
        return True

    async def problem(self, problem: Problem) -> None:
        """Send a problem as the whole response."""
        problem = self.named(problem)
        self.outcome = problem.suffix
        await self.respond(problem.status, problem.headers(), problem.body())

    def named(self, problem: Problem) -> Problem:
        """Return ``problem`` with this request's id."""
        return problem if problem.request_id else replace(problem, request_id=self.request_id)

    async def respond(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Send a whole response; large bodies go piece by piece."""
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        if len(body) <= limits.CHUNK_BYTES:
            self.sent_bytes += len(body)
            await self._deliver({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await self.part(body)
            await self.end()

    async def _deliver(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise ClientGoneError("the client went away") from error
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    def abort(self) -> None:
        """Cut the connection, with whatever is still unsent."""
        if self.connection is not None:
            self.connection.abort()

    def hold(self) -> None:
        """The request goes to the ranks or to an endpoint: its connection is not cut in favour of another.

        Raises:
            ProblemError: 503, too many connections have a request in hand.
        """
        if self.connection is not None:
            self.connection.hold()

    def add(self, ticket: Ticket) -> None:
        """Count the waits of a ticket that is over."""
        if ticket.queue_wait is not None:
            self.queue_wait = (self.queue_wait or 0.0) + ticket.queue_wait
        if ticket.run_time is not None:
            self.run_time = (self.run_time or 0.0) + ticket.run_time

    def log(self) -> None:
        """Write the access line, as soon as the answer is on its way; never a payload."""
        if _access.isEnabledFor(logging.INFO):
            # An event loop may collect what is written in one turn: the line must not hold up the answer.
            asyncio.get_running_loop().call_soon(self._log, time.perf_counter() - self.began)

    def _log(self, duration: float) -> None:
        fields = {
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "outcome": self.outcome,
            "request_id": self.request_id,
            "caller": self.caller if self.caller.startswith("key-") else "anonymous",
            "queue_wait": _rounded(self.queue_wait),
            "run_time": _rounded(self.run_time),
            "duration": _rounded(duration),
            "bytes": self.sent_bytes,
        }
        _access.info("%s %s %d %s", self.method, self.path, self.status, self.outcome, extra=fields)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
