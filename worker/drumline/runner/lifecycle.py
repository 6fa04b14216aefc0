"""Start and stop of a group of ranks, and its status: the half of ``DistributedRunner`` that has no requests."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from drumline import context, logs
from drumline import nursery_protocol as wire
from drumline.contract import Backend, Device, RestartSettings
from drumline.errors import DrumlineError, NotReady
from drumline.runner import plan
from drumline.runner.engine import Engine
from drumline.runner.keepalive import Keepalive
from drumline.runner.observer import Observer
from drumline.runner.state import Group, State
from drumline.runner.status import FailureStatus, RankStatus, RunnerStatus, Watch, failure_status
from drumline.worker import DistributedWorker

log = logging.getLogger("drumline.runner")

RestartPolicy = RestartSettings


class Lifecycle:
    """Parameters, start and stop of a group; :class:`drumline.runner.runner.DistributedRunner` adds the requests."""

    def __init__(
        self,
        worker_cls: type[DistributedWorker] | str = DistributedWorker,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
        worker_addr: str | None = None,
        worker_port: int | None = None,
        timeout: float | None = None,
        keepalive_payload: Mapping[str, Any] | None = None,
        keepalive_interval: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        set_device: bool | None = None,
        *,
        device: Device | None = None,
        backend: Backend | None = None,
        max_queue_depth: int | None = None,
        hang_timeout: float | None = None,
        cancel_grace: float | None = None,
        restart: RestartPolicy | None = None,
        warmup: Mapping[str, Any] | None = None,
        start_method: str = "auto",
        revision: str | None = None,
        stream_buffer_bytes: int | None = None,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if set_device is not None:
            warnings.warn(
                "set_device has no effect: every rank's device is always set", DeprecationWarning, stacklevel=2
            )
        self.worker_cls = worker_cls
        self.world_size = world_size
        self.master_addr = master_addr
        self.master_port = master_port
        self.worker_addr = worker_addr
        self.worker_port = worker_port
        self.keepalive_payload = dict(keepalive_payload or {})
        self.keepalive_interval = keepalive_interval
        self.cwd = os.fspath(cwd) if cwd is not None else None
        preset = context.preset()
        self.timeout = timeout if timeout is not None else preset.collective_timeout
        self.device = device if device is not None else preset.device
        self.backend = backend if backend is not None else preset.backend
        self.max_queue_depth = max_queue_depth if max_queue_depth is not None else preset.max_queue_depth
        self.hang_timeout = hang_timeout if hang_timeout is not None else preset.hang_timeout
        self.cancel_grace = cancel_grace if cancel_grace is not None else preset.cancel_grace
        self.restart = restart or preset.restart or RestartPolicy()
        self.warmup = warmup
        self.start_method = start_method
        self.revision = revision if revision is not None else preset.revision
        self.stream_buffer_bytes = (
            stream_buffer_bytes if stream_buffer_bytes is not None else preset.stream_buffer_bytes
        )
        self.observers: list[Observer] = []
        self._reference = plan.reference_of(worker_cls)
        self._engine: Engine | None = None
        self._group = self._new_group()
        self._draining = False
        self._watch = Watch()
        self._failure: tuple[DrumlineError, FailureStatus] | None = None
        self._keepalive: Keepalive | None = None

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
        self._engine = engine = Engine(self._group, self._plan(timeout, setup_kwargs), self.observers, self._changed)
        context.runners.add(self)
        # A script that ends without stop() must end, and its ranks with it.
        atexit.register(engine.abandon)
        engine.start()
        try:
            await asyncio.shield(engine.started)
        except asyncio.CancelledError:
            await self._shut_down(0)
            raise
        except DrumlineError:
            await self._release()
            raise
        if self.keepalive_interval is not None:
            self._keepalive = Keepalive(self.keepalive_interval, self._keep_alive)

    def _keep_alive(self) -> None:
        """Run the keep-alive request; the subclass knows how."""

    def _plan(self, timeout: float, setup_kwargs: Mapping[str, Any]) -> plan.Plan:
        environment = plan.environment(self.world_size, self.master_addr, self.master_port)
        template = wire.RankConfig(
            self._reference, 0, self.world_size, self.device, self.backend, "", self.timeout, environment
        )
        setup = plan.packed(setup_kwargs, "setup")
        return plan.Plan(
            reference=self._reference,
            template=template,
            cwd=self.cwd,
            method=self.start_method,
            make_channel=plan.channel_maker(self.world_size, self.worker_addr, self.worker_port),
            setup=(setup.data, setup.buffers),
            warmup=plan.packed(self.warmup, "warmup", inline=True).data if self.warmup is not None else b"",
            startup_timeout=timeout,
            hang_timeout=self.hang_timeout,
        )

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
            atexit.unregister(engine.abandon)
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

    def _changed(self) -> None:
        self._watch.changed()
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
        if incarnation is not None and incarnation.number != self._group.incarnation:
            incarnation = None
        missing = "starting" if self._engine is not None else "lost"
        return RunnerStatus(
            state="draining" if self._draining and self._group.accepts else str(self._group.state),
            version=self._watch.version,
            world_size=self.world_size,
            ready_ranks=len(self._group.ready_ranks),
            ranks=incarnation.status()
            if incarnation is not None
            else [RankStatus(rank, state=missing) for rank in range(self.world_size)],
            restarts=self._group.restarts,
            last_failure=self._remember_failure(),
            queue_depth=len(self._group.queue),
            in_flight=int(self._group.flight is not None),
            revision=self.revision,
        )
