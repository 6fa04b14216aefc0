"""The request loop of one rank: receive, run user code in the main thread, answer."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from drumline import codec, protocol
from drumline.errors import EncodingError, InvalidPayload, RequestCancelled
from drumline.page import Page
from drumline.rank.failures import describe
from drumline.rank.gate import Gate
from drumline.rank.link import Link
from drumline.rank.updates import Updates
from drumline.worker import DistributedWorker, RequestContext, Services

_IDLE = RequestContext()


class RankLoop:
    """Serve the runner on ``link`` with one worker."""

    def __init__(self, link: Link, page: Page, rank: int) -> None:
        self._link = link
        self._page = page
        self._rank = rank
        self._gate = Gate(page, rank)
        self._updates = Updates(link)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forked = False
        os.register_at_fork(after_in_child=self._in_child)
        self._worker: DistributedWorker
        self._bind: Callable[[dict[str, Any]], dict[str, Any]]

    def attach(
        self,
        worker: DistributedWorker,
        bind: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        takes_streaming: bool,
        collectives: Callable[[], int],
    ) -> None:
        """Take the worker to serve.

        Args:
            worker: the user's worker, built but not set up.
            bind: checks a payload and returns keyword arguments.
            takes_streaming: whether its ``__call__`` has the parameter ``streaming``.
            collectives: tells how many collectives this rank has begun.
        """
        self._collectives = collectives
        worker._services = Services(
            emit=self._emit, emit_error=self._updates.emit_error, beat=self._beat, reach=self._reach
        )
        self._worker = worker
        self._bind = bind
        self._takes_streaming = takes_streaming

    def _run(self, streaming: bool, payload: dict[str, Any]) -> Any:
        arguments = self._bind(payload)
        if self._takes_streaming:
            return self.run_user(self._worker, streaming=streaming, **arguments)
        return self.run_user(self._worker, **arguments)

    # -- lent to the worker

    def _emit(self, value: Any, image_format: str) -> None:
        self._page.beat(self._rank)
        self._updates.emit(value, image_format)

    def _beat(self) -> None:
        self._page.beat(self._rank)

    def _reach(self) -> None:
        if self._gate.reach():
            raise RequestCancelled(f"the request was cancelled at step {self._gate.step}", step=self._gate.step)

    # -- messages

    def run_user(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call user code; await it when it is a coroutine, on this process's one event loop."""
        result = function(*args, **kwargs)
        if type(result) is not dict and inspect.isawaitable(result):
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                asyncio.set_event_loop(self._loop)
            result = self._loop.run_until_complete(_await(result))
        return result

    def warm_up(self, payload: dict[str, Any]) -> None:
        """Run one request whose result nobody wants, before the rank is ready."""
        self._run(False, payload)

    def serve(self) -> None:
        """Answer calls until teardown or until the runner is gone."""
        link, decode = self._link, protocol.decode_runner_message
        while True:
            try:
                data, buffers = link.receive()
            except (EOFError, OSError):
                return
            message = decode(data)
            del data
            if type(message) is protocol.Call:
                self._call(message, buffers)
            elif type(message) is protocol.Teardown:
                self._teardown()
                return
            del message, buffers

    def _call(self, call: protocol.Call, buffers: list[Any]) -> None:
        sequence, worker = call.sequence, self._worker
        before = self._collectives()
        payload = None
        self._gate.begin(sequence)
        self._updates.begin(sequence, streaming=call.streaming, pixels=call.images == "pixels")
        worker.request = RequestContext(call.request_id, call.deadline or None, call.headers, call.streaming)
        answer: protocol.RankMessage
        out: list[Any] = []
        failed = True
        try:
            payload = codec.unpack(call.payload, buffers)
            if type(payload) is not dict:
                raise InvalidPayload("the payload must be an object")
            value = self._run(call.streaming, payload)
            self._updates.end()
            if self._rank == 0:
                data, out = codec.pack(value, images=call.images)
                del value
                answer = protocol.Returned(sequence, 0, data)
            else:
                answer = protocol.Returned(sequence, 0)
            failed = False
        except RequestCancelled as error:
            answer = protocol.Stopped(sequence, 0, _step_of(error, self._gate.step))
        except BaseException as error:  # user code may raise anything, SystemExit included
            answer = protocol.Raised(sequence, 0, describe(error))
        if self._forked:
            os._exit(0)
        self._gate.end(failed=failed)
        worker.request = _IDLE
        # Before the answer: its memory is free for the next payload.
        payload = None
        buffers.clear()
        if failed:
            self._updates.abandon()
        _flush()
        count = self._collectives() - before
        if count:
            answer = _with_collectives(answer, count)
        try:
            self._link.send(protocol.encode(answer), out)
        except (OSError, MemoryError) as error:
            if isinstance(error, ConnectionError) or not out:
                raise
            failure = describe(EncodingError(f"there is no memory to carry the result in: {error}"))
            self._link.send(protocol.encode(protocol.Raised(sequence, count, failure)))

    def _in_child(self) -> None:
        """In a process that user code has forked: it must never speak for the rank."""

        def refuse(*_: Any) -> NoReturn:
            raise RuntimeError("this process was forked by a rank; only the rank itself can talk to the runner")

        self._forked = True
        self._link.send = refuse  # type: ignore[assignment,method-assign]

    def _teardown(self) -> None:
        failure = None
        self._page.beat(self._rank)
        try:
            self.run_user(self._worker.teardown)
        except BaseException as error:
            failure = describe(error)
        _flush()
        self._link.send(protocol.encode(protocol.TornDown(failure)))


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _with_collectives(answer: Any, count: int) -> protocol.RankMessage:
    import msgspec

    replaced: protocol.RankMessage = msgspec.structs.replace(answer, collectives=count)
    return replaced


def _step_of(error: RequestCancelled, reached: int) -> int:
    step = error.step
    return step if type(step) is int and 0 <= step < 1 << 32 else reached  # user code may raise it with anything


def _flush() -> None:
    # Before the answer, so that the runner knows which request a line belongs to.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # user code may have replaced or closed them
            stream.flush()
