"""The outermost ASGI application: ids, keys, app ids, the hot routes, problems and the access line of every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterable, MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from drumline import problems
from drumline.context import RequestInfo, current_request
from drumline.contract import RESERVED_PATHS, RunnerSettings
from drumline.problems import Problem, ProblemError
from drumline.runner.observer import Observer
from drumline.runner.ticket import Ticket
from drumline.server import body, limits
from drumline.server.auth import OPEN_PATHS, ApiKeys
from drumline.server.body_budget import BodyBudget
from drumline.server.calls import Calls, Work, method_not_allowed, passed_headers
from drumline.server.exchange import SCOPE_KEY, ClientGoneError, Exchange, Message, Receive, Scope, Send
from drumline.server.metrics import Metrics
from drumline.server.service import Service

log = logging.getLogger("drumline.server")

_exchange: ContextVar[Exchange | None] = ContextVar("drumline_exchange", default=None)


class Edge:
    """Everything that is true for every request, then the hot routes, then FastAPI for the rest.

    Args:
        service: what is served.
        settings: of the container.
        inner: the FastAPI application.
        metrics: counts calls that never get to a runner.
    """

    def __init__(self, service: Service, settings: RunnerSettings, inner: Any, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._inner = inner
        self._metrics = metrics
        self._keys = ApiKeys(settings.api_keys)
        self._bodies = BodyBudget(settings.max_bodies_bytes, settings.max_body_bytes)
        self._calls = Calls(service.runner, settings, self._bodies) if service.runner is not None else None
        own = ["/", "/stream"] if self._calls else [route.path for route in _routes(service)]
        self._addresses = Addresses(settings, own)
        roots = ("/", f"/{settings.app_id}", f"/{settings.app_id}/")
        self._roots = tuple(path for path in roots if not is_reserved(path))
        self._open: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        if self._calls is None:
            service.observers.append(_Tickets())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            exchange = Exchange(scope, receive, send)
            await self._http(exchange, self._route(exchange))

    def begin(self, scope: Scope, receive: Receive, send: Send, content: bytes) -> bool:
        """Serve a call of the worker that has come as a whole, if it is one, without a task for it.

        Args:
            scope: as an ASGI application gets it.
            receive: likewise.
            send: likewise.
            content: the request's body.

        Returns:
            Whether it is served. If not, nothing was done, and it has to be served as ASGI says.
        """
        if self._calls is None or scope["method"] != "POST" or scope["path"] not in self._roots:
            return False
        exchange = Exchange(scope, receive, send)
        connection = exchange.connection
        if connection is None:
            return False

        def spawn(work: Work) -> None:
            connection.run(self._http(exchange, work))

        try:
            exchange.caller = self._keys.caller(exchange.headers, exchange.client)
            self._enter(exchange)
            self._service.check_accepts()
            self._calls.begin(exchange, content, spawn, lambda: self._close(exchange))
        except Exception as error:
            spawn(_raised(error))
        return True

    async def until_idle(self) -> None:
        """Return when no call of a client is being answered."""
        await self._idle.wait()

    async def _http(self, exchange: Exchange, work: Work) -> None:
        try:
            await work
        except ClientGoneError:
            exchange.outcome = "cancelled"
        except Exception as error:
            await self._fail(exchange, error)
            error.__traceback__ = None  # its frames hold the ticket, which holds the error
        finally:
            self._close(exchange)

    def _enter(self, exchange: Exchange) -> None:
        """It is a call: whoever stops the server waits for it."""
        exchange.is_call = True
        self._open.add(exchange)
        self._idle.clear()

    def _close(self, exchange: Exchange) -> None:
        """It is answered, or nobody is there to be answered."""
        self._bodies.release(exchange)
        exchange.outcome = exchange.outcome or _outcome(exchange.status)
        if exchange.is_call:
            self._open.discard(exchange)
            if not self._open:
                self._idle.set()
            if not exchange.tickets:
                self._metrics.refused(exchange.outcome)
        exchange.log()

    async def _route(self, exchange: Exchange) -> None:
        exchange.caller = exchange.client
        path = self._addresses.resolve(exchange.path)
        if path not in OPEN_PATHS:
            exchange.caller = self._keys.caller(exchange.headers, exchange.client)
        if is_reserved(path) or (self._calls is not None and path not in ("/", "/stream")):
            await self._control(exchange, path)
            return
        self._enter(exchange)
        if self._calls is None:
            await self._app_call(exchange, path)
        elif exchange.method != "POST":
            raise method_not_allowed(exchange.method, path, "POST")
        else:
            self._service.check_accepts()
            await (self._calls.invoke(exchange) if path == "/" else self._calls.stream(exchange))

    async def _control(self, exchange: Exchange, path: str) -> None:
        scope = _scope(exchange, path)
        if exchange.method == "HEAD":  # whoever answers GET answers HEAD; the connection leaves the body out
            scope["method"] = "GET"
        await self._inner(scope, exchange.receive, exchange.send)

    async def _app_call(self, exchange: Exchange, path: str) -> None:
        self._service.check_accepts()
        self._service.runners()
        body.check_size(exchange, self._settings.max_body_bytes)
        _exchange.set(exchange)
        current_request.set(RequestInfo(exchange.request_id, exchange.caller, passed_headers(exchange.headers)))
        incoming = _Incoming(exchange, self._settings.max_body_bytes, self._bodies)
        await incoming.begin()
        exchange.hold()
        try:
            await self._inner(_scope(exchange, path), incoming.receive, exchange.send)
        finally:
            incoming.stop()

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer an error that came all the way up."""
        problem = problems.from_error(error, exchange.request_id, self._settings.debug)
        if exchange.failure is not error and problem.suffix == "internal-error":
            log.error("a request failed", exc_info=error, extra={"request_id": exchange.request_id})
        exchange.outcome = problem.suffix
        if exchange.complete:
            return
        if exchange.started:
            exchange.abort()  # too late for another status; a cut connection is the only honest sign
            return
        with contextlib.suppress(ClientGoneError):
            await exchange.problem(problem)


class Addresses:
    """Turns ``/{namespace}/{name}/path`` into ``/path``.

    Args:
        settings: our own id, and whether any other is taken for ours.
        own: paths of the app's endpoints; they win over ids.
    """

    def __init__(self, settings: RunnerSettings, own: Iterable[str]) -> None:
        self._prefix = f"/{settings.app_id}"
        self._app_id = settings.app_id
        self._any = settings.any_id
        paths = list(own)
        self._exact = frozenset(path for path in paths if "{" not in path)
        self._patterns: list[re.Pattern[str]] = [compile_path(path)[0] for path in paths if "{" in path]

    def resolve(self, path: str) -> str:
        """Return the path below the app's id.

        Raises:
            ProblemError: 404, this is the id of another app.
        """
        if path in self._exact or is_reserved(path):
            return path
        if path.startswith(self._prefix) and path[len(self._prefix) : len(self._prefix) + 1] in ("", "/"):
            return path[len(self._prefix) :] or "/"
        if any(pattern.match(path) for pattern in self._patterns):
            return path
        parts = path.split("/", 3)
        if len(parts) < 3 or not parts[1] or not parts[2]:
            return path
        if self._any:
            return "/" + (parts[3] if len(parts) > 3 else "")
        text = f"This server is {self._app_id}: use /{self._app_id}, or / and /stream without an id."
        raise ProblemError(problems.make("not-found", text))


async def _raised(error: Exception) -> None:
    raise error


def _outcome(status: int) -> str:
    """The outcome of an exchange that nobody named one for: a plain response, or none (status 0)."""
    if status == 0:
        return "cancelled"
    if status < 400:
        return "ok"
    return "not-ready" if status == 503 else "http-error"


def is_reserved(path: str) -> bool:
    """Whether ``path`` belongs to the server and to no app."""
    return path in RESERVED_PATHS or path.startswith(_RESERVED_BELOW)


_RESERVED_BELOW = tuple(f"{path}/" for path in RESERVED_PATHS)


class _Incoming:
    """The request of an App's endpoint: bounded, and watched for the client going away while the endpoint works."""

    def __init__(self, exchange: Exchange, max_bytes: int, bodies: BodyBudget) -> None:
        self._exchange = exchange
        self._bytes = 0
        self._max_bytes = max_bytes
        self._bodies = bodies
        self._seconds = limits.body_deadline(max_bytes)
        self._refused: Problem | None = None
        self._first: Message | None = None
        self._gone = asyncio.Event()
        self._complete = False
        self._watch: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Read the first part, so that the watch also begins for endpoints that never ask for the body."""
        self._first = await self._next()

    async def receive(self) -> Message:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._refused is not None:  # whoever asks again must not get the rest of it
            raise RefusedError(self._refused)
        if not self._complete:
            try:
                return await self._next()
            except ProblemError as error:
                self._refused = error.problem
                raise RefusedError(error.problem) from error
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _next(self) -> Message:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(min(limits.BODY_IDLE_SECONDS, self._seconds)):
                message = await self._exchange.receive()
        except TimeoutError:
            raise ProblemError(problems.make("body-timeout", "The rest of the body did not arrive.")) from None
        self._seconds -= clock() - began  # only waiting counts: an endpoint may take its time between two parts
        if message["type"] == "http.disconnect":
            self._gone.set()
            self._complete = True
            return message
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._max_bytes:
            raise body.too_large(self._max_bytes)
        self._bodies.hold(self._exchange, self._bytes)
        if not message.get("more_body", False):
            self._complete = True
            self._watch = asyncio.get_running_loop().create_task(self._wait())
        return message

    async def _wait(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        if not self._exchange.complete:
            self._gone.set()
            for ticket in list(self._exchange.running):
                ticket.cancel("the client went away")

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()


class RefusedError(HTTPException):
    """A problem of the request's body, in the form that FastAPI lets through."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status, problem.text)
        self.problem = problem


class _Tickets(Observer):
    """Tells an App's exchange which tickets its endpoint made, and what became of them."""

    def __init__(self) -> None:
        self._owners: dict[Ticket, Exchange] = {}

    def request_queued(self, ticket: Ticket) -> None:
        exchange = _exchange.get()
        if exchange is not None:
            exchange.tickets += 1
            exchange.running.add(ticket)
            self._owners[ticket] = exchange

    def request_finished(self, ticket: Ticket) -> None:
        exchange = self._owners.pop(ticket, None)
        if exchange is not None:
            exchange.running.discard(ticket)
            exchange.add(ticket)


def _routes(service: Service) -> list[Any]:
    return [route for route in service.router.routes if hasattr(route, "path")] if service.router is not None else []


def _scope(exchange: Exchange, path: str) -> MutableMapping[str, Any]:
    return {**exchange.scope, "path": path, "raw_path": path.encode(), SCOPE_KEY: exchange}


async def _lifespan(receive: Receive, send: Send) -> None:
    """The server starts and stops the service itself: ASGI's lifespan has nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
