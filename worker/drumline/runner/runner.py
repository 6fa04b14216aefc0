"""``DistributedRunner``: start a group of ranks, send it requests, stop it."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

from drumline import codec, context, problems, signature, sse
from drumline.errors import Draining, DrumlineError, QueueFull, RequestCancelled
from drumline.runner import plan, request_ids
from drumline.runner.lifecycle import Lifecycle, RestartPolicy
from drumline.runner.nursery import describe_json_schema
from drumline.runner.status import RunnerStatus
from drumline.runner.ticket import Ticket

__all__ = ["DistributedRunner", "RestartPolicy"]


class DistributedRunner(Lifecycle):
    """Run ``world_size`` ranks of one worker class and give them requests, one at a time.

    All methods belong to the event loop of :meth:`start`. Several runners may live in one process and on one host.
    Where a default below is None, the settings of the server decide inside of an App; elsewhere it is the value named.

    Args:
        worker_cls: a :class:`DistributedWorker` subclass at module level of a file, or ``"module:Class"`` or
            ``"path.py:Class"``, which this process then never imports.
        world_size: number of ranks.
        master_addr: value of ``MASTER_ADDR`` in the ranks (the rendezvous itself is a private file).
        master_port: value of ``MASTER_PORT``; None picks a free one.
        worker_addr: with ``worker_port``: talk to the ranks over ZeroMQ, encrypted and authenticated with CURVE, at
            this address. Without them: inherited sockets that nobody else can reach.
        worker_port: port of that channel; None with a ``worker_addr`` picks a free one.
        timeout: seconds that a collective of the default process group may take. Default: a day, so that the other
            time-outs come first.
        keepalive_payload: payload of the request that is run when nothing else was for ``keepalive_interval``.
        keepalive_interval: seconds; None never does that.
        cwd: working directory of the ranks.
        set_device: accepted for fal's sake, with one warning: the device is always set.
        device: ``cuda``, ``cpu``, or ``auto`` (the default): cuda when there is a GPU for every rank.
        backend: ``nccl``, ``gloo``, or ``auto`` (the default): nccl on cuda, gloo on cpu.
        max_queue_depth: requests that may wait; one more raises :class:`QueueFull`. Default: 64.
        hang_timeout: seconds without any sign of progress (``checkpoint()``, ``progress()``, an update) after which a
            running request's group is taken to hang. Default: 900.
        cancel_grace: seconds that ranks have to leave a request after its cancellation or a peer's error. Default: 10.
        restart: how often the group may be restarted. Default: ``RestartPolicy()``.
        warmup: payload of a request that every rank runs before it is ready.
        start_method: ``fork``, ``spawn`` or ``auto``: fork unless importing the worker's module initialised CUDA.
        revision: shown in the status.
        stream_buffer_bytes: unread updates that a stream may pile up before it is cancelled. Default: 256 MiB.
    """

    _numbers: Iterator[int] = itertools.count(1)

    # -- requests

    async def invoke(self, payload: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Run one request and return rank 0's value: tensors, arrays and images keep type, dtype and pixels.

        Args:
            payload: keyword arguments of the worker's ``__call__``.
            timeout: seconds for waiting and running together; None for none.

        Raises:
            QueueFull, NotReady, InvalidPayload: at once.
            RequestTimeout: after ``timeout``; the ranks are told to stop.
            WorkerError, EncodingError, RankLost, RankHung, RequestCancelled: how the request failed.
        """
        ticket = self.submit(payload or {}, timeout=timeout)
        try:
            packed = await ticket.result()
        finally:
            ticket.cancel("the caller was cancelled")
        return codec.unpack(packed.data, packed.buffers)

    async def stream(
        self,
        payload: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        streaming_timeout: float | None = None,
        as_text_events: bool = False,
    ) -> AsyncIterator[Any]:
        """Run one request and yield every update, then the result. Closing the iterator cancels the request.

        Args:
            payload: keyword arguments of the worker's ``__call__``, which gets ``streaming=True``.
            timeout: seconds for the whole request.
            streaming_timeout: seconds between two updates.
            as_text_events: yield server-sent events (bytes) that end with exactly one ``result`` or ``error`` event,
                instead of values; then nothing is raised after the first event.

        Raises:
            as :meth:`invoke`; ``RequestTimeout`` also after ``streaming_timeout`` without an update.
        """
        if as_text_events:
            try:
                ticket = self.submit(payload or {}, timeout=timeout, streaming=True, images="jpeg")
            except DrumlineError as error:
                yield _text_error(error)
                return
            ticket.limit_silence(streaming_timeout)
            async for chunk in ticket.text_events():
                yield chunk
            return
        ticket = self.submit(payload or {}, timeout=timeout, streaming=True)
        ticket.limit_silence(streaming_timeout)
        try:
            async for update in ticket.updates():
                yield codec.unpack(update.data, update.buffers)
            packed = await ticket.result()
            yield codec.unpack(packed.data, packed.buffers)
        finally:
            ticket.cancel("the reader went away")

    def submit(
        self,
        payload: Mapping[str, Any],
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        streaming: bool = False,
        images: str = "pixels",
        request_id: str | None = None,
        caller: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Ticket:
        """Queue one request and return its ticket. Never blocks.

        Args:
            payload: keyword arguments of the worker's ``__call__``.
            timeout: seconds until its end.
            queue_timeout: seconds until its start.
            streaming: updates are wanted.
            images: "pixels" for pixels, else the format that images of the result are encoded in.
            request_id: its name; taken over from the HTTP request in hand, else made.
            caller: requests are served first come first served per caller, turn by turn between callers.
            headers: what the worker sees in ``self.request.headers``.

        Raises:
            QueueFull: too many requests wait already.
            NotReady: the runner is not running, or (``Draining``) about to stop.
            InvalidPayload: the payload cannot be carried.
        """
        if self._draining:
            raise Draining("the process is shutting down", state="draining", retry_after=1.0)
        if self._engine is None or not self._group.accepts:
            raise self._not_ready()
        if self._group.queue.full and not self._group.idle:
            depth = len(self._group.queue)
            # When those that wait now have run, if they are like those before them.
            wait = min(max(depth * self._engine.mean_run_time, 1.0), 60.0)
            raise QueueFull(f"{depth} requests wait already", depth=depth, retry_after=wait)
        packed = plan.packed(payload, "payload")
        info = context.current_request.get()
        number = next(self._numbers)
        ticket = Ticket(
            number,
            request_id or (info.request_id if info else None) or request_ids.new(),
            (info.caller if info else "") if caller is None else caller,
            packed,
            streaming=streaming,
            images=images,
            deadline=time.time() + timeout if timeout is not None else 0.0,
            headers=dict(headers if headers is not None else info.headers if info else ()),
            buffer_limit=self.stream_buffer_bytes,
            cancel=self._cancel,
        )
        engine = self._engine
        if timeout is not None:
            ticket.timers.append(engine.loop.call_later(max(timeout, 0), self._expire, number, False))
        if queue_timeout is not None and (timeout is None or queue_timeout < timeout):
            ticket.timers.append(engine.loop.call_later(max(queue_timeout, 0), self._expire, number, True))
        if self._keepalive is not None:
            self._keepalive.postpone()
        engine.add(ticket)
        return ticket

    def _expire(self, number: int, waiting_only: bool) -> None:
        if self._engine is not None:
            self._engine.perform(self._group.expired(number, waiting_only=waiting_only))

    def _cancel(self, number: int, reason: DrumlineError) -> None:
        if self._engine is not None:
            self._engine.perform(self._group.cancel(number, reason))

    def cancel(self, request_id: str) -> bool:
        """Cancel every request named ``request_id`` that waits or runs; False when there is none."""
        if self._engine is None:
            return False
        found = [t for t in self._engine.tickets.values() if t.request_id == request_id]
        for ticket in found:
            self._cancel(ticket.number, RequestCancelled("the request was cancelled"))
        return bool(found)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, wait for the accepted ones, cancel what is left after ``timeout`` seconds."""
        self._draining = True
        self._changed()
        try:
            async with asyncio.timeout(timeout):
                while self._engine is not None and self._engine.tickets:
                    await next(iter(self._engine.tickets.values())).wait()
        except TimeoutError:
            assert self._engine is not None
            for ticket in list(self._engine.tickets.values()):
                self._cancel(ticket.number, Draining("the process is shutting down", state="draining", retry_after=1.0))
            while self._engine is not None and self._engine.tickets:
                await next(iter(self._engine.tickets.values())).wait()

    def _keep_alive(self) -> None:
        if self._group.idle:
            self.submit(self.keepalive_payload, request_id="keepalive", caller="keepalive")

    # -- restart on demand

    def reload(self) -> None:
        """Replace the ranks by new ones that import the worker's module afresh; waiting requests wait for them."""
        if self._engine is not None:
            self._engine.reload()

    # -- status

    @property
    def request_schema(self) -> dict[str, Any] | None:
        """JSON Schema of the worker's ``__call__``; None until the worker's module has been imported."""
        if isinstance(self.worker_cls, type):
            return _schema_of(self.worker_cls)
        nursery = self._engine.nursery if self._engine is not None else None
        return cast("dict[str, Any] | None", describe_json_schema(nursery.description if nursery else None))

    async def wait_status(self, since: int, timeout: float) -> RunnerStatus:
        """Return the status as soon as its version is above ``since``, at the latest after ``timeout`` seconds."""
        await self._watch.wait(since, timeout)
        return self.status


_schemas: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def _schema_of(cls: type) -> dict[str, Any]:
    if cls not in _schemas:
        _schemas[cls] = signature.request_model(cls).json_schema()
    return _schemas[cls]


def _text_error(error: DrumlineError) -> bytes:
    return sse.error(0, problems.from_error(error).body())
