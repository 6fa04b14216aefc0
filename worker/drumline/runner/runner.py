"""``DistributedRunner``: start a group of ranks, send it requests, stop it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
import uuid
import warnings
import weakref
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self, cast

from drumline import codec, context, logs, signature
from drumline import nursery_protocol as wire
from drumline.codec import Packed
from drumline.contract import Backend, Device, RestartSettings
from drumline.errors import (
    Draining,
    DrumlineError,
    EncodingError,
    InvalidPayload,
    NotReady,
    QueueFull,
    RequestCancelled,
)
from drumline.runner.channel.local import LocalChannel
from drumline.runner.channel.port import Channel
from drumline.runner.engine import Engine, Plan, reference_of
from drumline.runner.nursery import describe_json_schema
from drumline.runner.observer import Observer
from drumline.runner.state import Group, State
from drumline.runner.status import FailureStatus, RankStatus, RunnerStatus, failure_status, resident_bytes
from drumline.runner.ticket import Ticket
from drumline.worker import DistributedWorker

log = logging.getLogger("drumline.runner")

RestartPolicy = RestartSettings
_DAY = 86400.0


class DistributedRunner:
    """Run ``world_size`` ranks of one worker class and give them requests, one at a time.

    All methods belong to the event loop of :meth:`start`. Several runners may live in one process and on one host.

    Args:
        worker_cls: a :class:`DistributedWorker` subclass at module level of a file, or ``"module:Class"`` or
            ``"path.py:Class"``, which this process then never imports.
        world_size: number of ranks.
        master_addr: value of ``MASTER_ADDR`` in the ranks (the rendezvous itself is a private file).
        master_port: value of ``MASTER_PORT``; None picks a free one.
        worker_addr: with ``worker_port``: talk to the ranks over ZeroMQ, encrypted and authenticated with CURVE, at
            this address. Without them: inherited sockets that nobody else can reach.
        worker_port: port of that channel; None with a ``worker_addr`` picks a free one.
        timeout: seconds that a collective of the default process group may take.
        keepalive_payload: payload of the request that is run when nothing else was for ``keepalive_interval``.
        keepalive_interval: seconds; None never does that.
        cwd: working directory of the ranks.
        set_device: accepted for fal's sake, with one warning: the device is always set.
        device: ``cuda``, ``cpu``, or ``auto``: cuda when there is a GPU for every rank.
        backend: ``nccl``, ``gloo``, or ``auto``: nccl on cuda, gloo on cpu.
        max_queue_depth: requests that may wait; one more raises :class:`QueueFull`.
        hang_timeout: seconds without any sign of progress (``checkpoint()``, ``progress()``, an update) after which a
            running request's group is taken to hang.
        cancel_grace: seconds that ranks have to leave a request after its cancellation or a peer's error.
        restart: how often the group may be restarted.
        warmup: payload of a request that every rank runs before it is ready.
        start_method: ``fork``, ``spawn`` or ``auto``: fork unless importing the worker's module initialised CUDA.
        revision: shown in the status.
        stream_buffer_bytes: unread updates that a stream may pile up before it is cancelled.
    """

    def __init__(
        self,
        worker_cls: type[DistributedWorker] | str = DistributedWorker,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
        worker_addr: str | None = None,
        worker_port: int | None = None,
        timeout: float = _DAY,
        keepalive_payload: Mapping[str, Any] | None = None,
        keepalive_interval: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        set_device: bool | None = None,
        *,
        device: Device = "auto",
        backend: Backend = "auto",
        max_queue_depth: int = 64,
        hang_timeout: float = 900.0,
        cancel_grace: float = 10.0,
        restart: RestartPolicy | None = None,
        warmup: Mapping[str, Any] | None = None,
        start_method: str = "auto",
        revision: str = "",
        stream_buffer_bytes: int = 256 << 20,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if set_device is not None:
            warnings.warn("set_device has no effect: every rank's device is always set", DeprecationWarning, stacklevel=2)
        self.worker_cls = worker_cls
        self.world_size = world_size
        self.master_addr = master_addr
        self.master_port = master_port
        self.worker_addr = worker_addr
        self.worker_port = worker_port
        self.timeout = timeout
        self.keepalive_payload = dict(keepalive_payload or {})
        self.keepalive_interval = keepalive_interval
        self.cwd = os.fspath(cwd) if cwd is not None else None
        self.device = device
        self.backend = backend
        self.max_queue_depth = max_queue_depth
        self.hang_timeout = hang_timeout
        self.cancel_grace = cancel_grace
        self.restart = restart or RestartPolicy()
        self.warmup = warmup
        self.start_method = start_method
        self.revision = revision
        self.stream_buffer_bytes = stream_buffer_bytes
        self.observers: list[Observer] = []
        self._reference = reference_of(worker_cls)
        self._engine: Engine | None = None
        self._group = self._new_group()
        self._numbers = itertools.count(1)
        self._draining = False
        self._version = 0
        self._watchers: list[asyncio.Future[None]] = []
        self._failure: tuple[DrumlineError, FailureStatus] | None = None
        self._keepalive: asyncio.TimerHandle | None = None

    def _new_group(self) -> Group:
        return Group(
            self.world_size,
            max_queue_depth=self.max_queue_depth,
            cancel_grace=self.cancel_grace,
            restart=self.restart,
        )

    # -- life

    async def start(self, timeout: float = 1800.0, **setup_kwargs: Any) -> None:
        """Start the ranks and wait until ``setup(**setup_kwargs)`` (and the warm-up) returned on all of them.

        Args:
            timeout: seconds for all of that; also the bound of a later restart.
            **setup_kwargs: keyword arguments of the worker's ``setup()``: JSON-like data, tensors, arrays, images.

        Raises:
            SetupFailed: importing the module or ``setup()`` raised (that rank's exception and traceback), or took too long.
            RankLost: a rank died meanwhile.
            RuntimeError: the runner runs already.
        """
        if self._engine is not None:
            if self._group.state not in (State.FAILED, State.STOPPED):
                raise RuntimeError(f"the runner is {self._group.state} already")
            await self._release()
        self._group = self._new_group()
        self._draining = False
        logs.ensure_handler()
        self._engine = engine = Engine(
            self._group, self._plan(timeout, setup_kwargs), self.observers, self._changed
        )
        context.runners.add(self)
        _leave_nothing(self, engine)
        engine.start()
        try:
            await asyncio.shield(engine.started)
        except asyncio.CancelledError:
            await self._shut_down(0)
            raise
        except DrumlineError:
            await self._release()
            raise
        self._arm_keepalive()

    def _plan(self, timeout: float, setup_kwargs: Mapping[str, Any]) -> Plan:
        environment = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port or _free_port()),
        }
        template = wire.RankConfig(
            self._reference, 0, self.world_size, self.device, self.backend, "", self.timeout, environment
        )
        setup = self._pack(dict(setup_kwargs), "setup")
        warmup = self._pack(dict(self.warmup), "warmup", inline=True).data if self.warmup is not None else b""
        return Plan(
            self._reference, template, self.cwd, self.start_method, self._make_channel, (setup.data, setup.buffers),
            warmup, timeout, self.hang_timeout,
        )  # fmt: skip

    def _make_channel(self, incarnation: int) -> Channel:
        del incarnation
        if self.worker_addr is None and self.worker_port is None:
            return LocalChannel(self.world_size)
        from drumline.runner.channel.remote import RemoteChannel

        return RemoteChannel(self.world_size, self.worker_addr or "127.0.0.1", self.worker_port)

    async def stop(self, timeout: float = 10.0) -> None:
        """Stop: refuse waiting requests, cancel the running one, run ``teardown()`` on the ranks, end every process.

        Idempotent; also right after a crash. When it returns or raises, no process is left.

        Args:
            timeout: seconds for the orderly part; then the ranks are killed.

        Raises:
            WorkerError: ``teardown()`` raised on a rank.
            RankLost: a rank died (or did not end) while it tore down.
            RankHung: a rank was stopped by a signal while it tore down.
        """
        if self._engine is None:
            self._group.state = State.STOPPED
            return
        await self._shut_down(timeout)
        if self._group.teardown_failure is not None:
            failure, self._group.teardown_failure = self._group.teardown_failure, None
            raise failure

    async def _shut_down(self, timeout: float) -> None:
        engine = self._engine
        assert engine is not None
        if self._keepalive is not None:
            self._keepalive.cancel()
        engine.perform(self._group.stop())
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(engine.ended)
        except TimeoutError:
            engine.perform(self._group.kill())
            await engine.ended
        await self._release()

    async def _release(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            context.runners.discard(self)
            self._remember_failure()
            await engine.close()
            self._changed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except DrumlineError:
            if error is None:
                raise
            log.exception("stopping after an error failed too")

    def is_alive(self) -> bool:
        """Whether the group serves, or will again without anyone's doing (it is starting or restarting)."""
        return self._engine is not None and self._group.accepts

    def ensure_alive(self) -> None:
        """Raise :class:`NotReady` when :meth:`is_alive` is False."""
        if not self.is_alive():
            raise self._not_ready()

    def _not_ready(self) -> NotReady:
        state, failure = self._group.state, self._group.last_failure
        because = f" after: {failure}" if failure is not None else ""
        cure = "" if state == State.STOPPING else "; call start()"
        return NotReady(f"the runner is {state}{because}{cure}", state=str(state))

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
            raise QueueFull(f"{depth} requests wait already", depth=depth, retry_after=self._retry_after(depth))
        try:
            packed = self._pack(payload if type(payload) is dict else dict(payload), "payload")
        except (TypeError, ValueError) as error:
            raise InvalidPayload(f"the payload must be a mapping: {error}") from None
        info = context.current_request.get()
        number = next(self._numbers)
        ticket = Ticket(
            number,
            request_id or (info.request_id if info else None) or uuid.uuid4().hex,
            (info.caller if info else "") if caller is None else caller,
            packed,
            streaming=streaming,
            images=images,
            deadline=time.time() + timeout if timeout is not None else 0.0,
            headers=headers if headers is not None else (info.headers if info else {}),
            buffer_limit=self.stream_buffer_bytes,
            cancel=self._cancel,
        )
        engine = self._engine
        if timeout is not None:
            ticket.timers.append(engine.loop.call_later(max(timeout, 0), self._expire, number, False))
        if queue_timeout is not None and (timeout is None or queue_timeout < timeout):
            ticket.timers.append(engine.loop.call_later(max(queue_timeout, 0), self._expire, number, True))
        if self._keepalive is not None:
            self._arm_keepalive()
        engine.add(ticket)
        return ticket

    def _pack(self, value: dict[str, Any], path: str, *, inline: bool = False) -> Packed:
        try:
            data, buffers = codec.pack(value, path=path, **({"inline_limit": 1 << 62} if inline else {}))
        except EncodingError as error:
            raise InvalidPayload(str(error)) from None
        return Packed(data, buffers)

    @staticmethod
    def _retry_after(depth: int) -> float:
        return max(1.0, min(60.0, depth * 0.5))

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

    def _arm_keepalive(self) -> None:
        if self._keepalive is not None:
            self._keepalive.cancel()
        if self.keepalive_interval is not None and self._engine is not None:
            loop = self._engine.loop
            self._keepalive = loop.call_later(self.keepalive_interval, self._run_keepalive)

    def _run_keepalive(self) -> None:
        self._arm_keepalive()
        if self._group.idle:
            try:
                self.submit(self.keepalive_payload, request_id="keepalive", caller="keepalive")
            except DrumlineError as error:
                log.warning("keep-alive request: %s", error)

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

    def _changed(self) -> None:
        self._version += 1
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)
        if self.observers:
            status = self.status
            for observer in self.observers:
                observer.status_changed(status)

    def _remember_failure(self) -> FailureStatus | None:
        error = self._group.last_failure
        if error is None:
            return self._failure[1] if self._failure is not None else None
        if self._failure is None or self._failure[0] is not error:
            self._failure = (error, failure_status(error, time.time()))
        return self._failure[1]

    @property
    def status(self) -> RunnerStatus:
        """A snapshot of the state, the ranks, restarts, the last failure and the queue."""
        incarnation = self._engine.incarnation if self._engine is not None else None
        current = incarnation is not None and incarnation.number == self._group.incarnation
        ranks = []
        for number in range(self.world_size):
            rank = RankStatus(number, state="starting" if self._engine is not None else "lost")
            if incarnation is not None and current:
                known = incarnation.ranks[number]
                rank.pid, rank.device = known.pid, known.device
                rank.state = "paused" if known.paused else known.state
                if known.alive:
                    rank.rss_bytes = resident_bytes(known.pid)
                    rank.step = incarnation.page.step(number)
                    if rank.state == "ready" and incarnation.page.sequence(number):
                        rank.state = "busy"
            ranks.append(rank)
        state = "draining" if self._draining and self._group.accepts else str(self._group.state)
        return RunnerStatus(
            state=state,
            version=self._version,
            world_size=self.world_size,
            ready_ranks=len(self._group.ready_ranks),
            ranks=ranks,
            restarts=self._group.restarts,
            last_failure=self._remember_failure(),
            queue_depth=len(self._group.queue),
            in_flight=int(self._group.flight is not None),
            revision=self.revision,
        )

    async def wait_status(self, since: int, timeout: float) -> RunnerStatus:
        """Return the status as soon as its version is above ``since``, at the latest after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._version <= since:
                    watcher = asyncio.get_running_loop().create_future()
                    self._watchers.append(watcher)
                    await watcher
        except TimeoutError:
            pass
        return self.status


_schemas: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def _schema_of(cls: type) -> dict[str, Any]:
    if cls not in _schemas:
        _schemas[cls] = signature.request_model(cls).json_schema()
    return _schemas[cls]


def _text_error(error: DrumlineError) -> bytes:
    from drumline import problems, sse

    return sse.error(0, problems.from_error(error).body())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _leave_nothing(runner: DistributedRunner, engine: Engine) -> None:
    """End the processes at interpreter exit when nobody called ``stop()``."""
    finalizer = weakref.finalize(runner, engine.abandon)
    finalizer.atexit = True
