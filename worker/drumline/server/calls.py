"""Invoke and stream of a worker class: the two hot routes, as plain ASGI without a framework in the way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from drumline import codec, details, sse
from drumline.contract import RunnerSettings
from drumline.problems import ProblemError, make
from drumline.runner.ticket import Ticket, is_small, to_json
from drumline.server import body, limits
from drumline.server.body_budget import BodyBudget
from drumline.server.exchange import Exchange
from drumline.server.service import Runner

log = logging.getLogger("drumline.server")

#: The run time of one request, and its wait in the queue. The second is what fal's clients send as ``start_timeout``.
RUN_TIMEOUT_HEADER = "x-request-timeout"
QUEUE_TIMEOUT_HEADER = "x-fal-request-timeout"
Work = Coroutine[Any, Any, None]

_IMAGE_FORMATS = {"jpeg": "jpeg", "jpg": "jpeg", "png": "png", "webp": "webp"}

#: Request headers that a worker may see; never credentials.
PASSED_HEADERS = frozenset(
    {
        b"accept-language",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-fal-endpoint",
        b"x-fal-object-lifecycle-preference",
        b"x-fal-queue-priority",
        b"x-fal-request-id",
        b"x-fal-runner-hint",
        b"x-request-id",
    }
)


class Calls:
    """Serves ``POST /`` and ``POST /stream`` from one runner; ``bodies`` counts what they bring."""

    def __init__(self, runner: Runner, settings: RunnerSettings, bodies: BodyBudget) -> None:
        self._runner = runner
        self._settings = settings
        self._bodies = bodies
        self._check = body.PayloadCheck()

    async def invoke(self, exchange: Exchange) -> None:
        """Answer with the result as JSON, or with a problem."""
        ticket = await self._read_and_submit(exchange, streaming=False)
        await self._answer(exchange, ticket, _Watch(exchange, ticket))

    def begin(self, exchange: Exchange, raw: bytes, spawn: Callable[[Work], None], close: Callable[[], None]) -> None:
        """Queue a call without a task; it is answered in the turn of the event loop in which it is over.

        Args:
            exchange: of a connection that answers at once (see ``Transport``).
            raw: the whole body.
            spawn: runs what cannot be done at once: waiting for a slow client, encoding a large result, telling an error.
            close: called after an answer that needed no ``spawn``.

        Raises:
            DrumlineError, ProblemError: it was not queued.
        """
        timeouts = self._check_head(exchange)
        body.check_length(raw, self._settings.max_body_bytes)
        ticket = self._submit(exchange, raw, *timeouts, streaming=False)
        watch = _Watch(exchange, ticket)

        def over() -> None:
            text = _small_result(ticket)
            if text is not None and exchange.json_at_once(text):
                exchange.outcome = "ok"
                watch.stop()
                exchange.add(ticket)
                close()
            else:
                spawn(self._answer(exchange, ticket, watch, text))

        ticket.when_over(over)

    async def _answer(self, exchange: Exchange, ticket: Ticket, watch: _Watch, text: bytes | None = None) -> None:
        try:
            if text is None:
                text = await to_json(await ticket.result())
        finally:
            watch.stop()
            if not ticket.done:
                ticket.cancel("the server stopped serving this request")
            exchange.add(ticket)
        exchange.outcome = "ok"
        await exchange.json(text)

    async def stream(self, exchange: Exchange) -> None:
        """Answer with an event stream; what is wrong before the request is queued is a problem, not an event."""
        ticket = await self._read_and_submit(exchange, streaming=True)
        watch = _Watch(exchange, ticket)
        try:
            await exchange.start(200, sse.HEADERS)
            texts = ticket.text_events(self._settings.stream_keepalive, joined=limits.CHUNK_BYTES)
            async with contextlib.aclosing(texts) as events:  # type: ignore[type-var]
                async for text in events:
                    await exchange.part(text)
            await exchange.end()
        finally:
            watch.stop()
            if not ticket.done:
                ticket.cancel("the client went away")
            exchange.outcome = ticket.outcome or "cancelled"
            exchange.add(ticket)

    async def _read_and_submit(self, exchange: Exchange, *, streaming: bool) -> Ticket:
        timeouts = self._check_head(exchange)
        raw = await body.read(exchange, self._settings.max_body_bytes, self._bodies)
        return self._submit(exchange, raw, *timeouts, streaming=streaming)

    def _check_head(self, exchange: Exchange) -> tuple[float, float]:
        """Refuse what can be refused without the body; return the time-outs for running and for waiting, in seconds."""
        body.check_media_type(exchange)
        body.check_size(exchange, self._settings.max_body_bytes)
        run_timeout = _seconds(exchange.headers, RUN_TIMEOUT_HEADER, self._settings.request_timeout)
        return run_timeout, _seconds(exchange.headers, QUEUE_TIMEOUT_HEADER, self._settings.queue_timeout)

    def _submit(
        self, exchange: Exchange, raw: bytes, run_timeout: float, queue_timeout: float, *, streaming: bool
    ) -> Ticket:
        payload = codec.from_json(raw) if raw else {}
        self._check(payload, self._runner.request_schema)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("payload %s", raw[:4096].decode("utf-8", "replace"), extra={"request_id": exchange.request_id})
        exchange.hold()
        ticket = self._runner.submit(
            payload,
            timeout=run_timeout,
            queue_timeout=queue_timeout,
            streaming=streaming,
            images=_images(payload),
            request_id=exchange.request_id,
            caller=exchange.caller,
            headers=passed_headers(exchange.headers),
        )
        exchange.tickets = 1
        return ticket


def _small_result(ticket: Ticket) -> bytes | None:
    """The result as JSON; None when there is none, or a thread has to make it."""
    value = ticket.value
    if ticket.outcome != "ok" or value is None or not is_small(value):
        return None
    try:
        return codec.to_json(value.data, value.buffers)
    except Exception:  # it happens once more in the task, where it becomes a problem; here it would be the group's
        return None


class _Watch:
    """Cancels a ticket when its client goes away before the answer."""

    __slots__ = ("_connection", "_task", "_ticket")

    def __init__(self, exchange: Exchange, ticket: Ticket) -> None:
        self._ticket = ticket
        self._connection = exchange.connection
        self._task: asyncio.Task[None] | None = None
        if self._connection is not None:
            self._connection.on_lost = self._gone
        else:
            self._task = asyncio.get_running_loop().create_task(self._wait(exchange))

    def _gone(self) -> None:
        self._ticket.cancel("the client went away")

    async def _wait(self, exchange: Exchange) -> None:
        while (await exchange.receive())["type"] != "http.disconnect":
            pass
        self._gone()

    def stop(self) -> None:
        """Watch no more."""
        if self._connection is not None:
            self._connection.on_lost = None
        elif self._task is not None:
            self._task.cancel()


def passed_headers(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """The request headers that user code may see, names in lower case."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers.items()
        if name in PASSED_HEADERS or name.startswith(b"x-drumline-")
    }


def _images(payload: Mapping[str, Any]) -> str:
    """How images of the result are encoded: the payload's ``image_format`` when it names a format, else JPEG."""
    wanted = payload.get("image_format")
    return _IMAGE_FORMATS.get(wanted.lower(), "jpeg") if isinstance(wanted, str) else "jpeg"


def _seconds(headers: Mapping[bytes, bytes], name: str, limit: float) -> float:
    """A time-out from header ``name``; never longer than ``limit``, which is also the default."""
    raw = headers.get(name.encode())
    if raw is None:
        return limit
    try:
        seconds = float(raw)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise details.invalid(
            [details.problem(["header", name], "Input should be a number of seconds greater than 0", "greater_than")]
        )
    return min(seconds, limit)


def method_not_allowed(method: str, path: str, allowed: str) -> ProblemError:
    """The 405."""
    text = f"{method} {path} is not served; use {allowed}."
    return ProblemError(make("method-not-allowed", text, headers=(("allow", allowed),)))
