"""What is served: a runner by itself or an App with its routes, its phase of life, and the status of both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from enum import StrEnum
from typing import Any, Protocol, cast

from fastapi import APIRouter

from drumline import context
from drumline.contract import RunnerSettings
from drumline.errors import Draining, DrumlineError, NotReady
from drumline.runner.observer import Observer
from drumline.runner.status import RunnerStatus
from drumline.runner.ticket import Ticket

log = logging.getLogger("drumline.server")


class Phase(StrEnum):
    """Where a service is in its life: starting, ready, leaving, draining, stopped; or failed."""

    STARTING = "starting"  # setup and warm-up run: calls are refused with not-ready
    READY = "ready"
    LEAVING = "leaving"  # told to stop: not ready any more, calls are still taken
    DRAINING = "draining"  # calls are refused, those in flight go on
    STOPPED = "stopped"
    FAILED = "failed"


class Runner(Protocol):
    """What the server needs of a ``DistributedRunner``."""

    observers: list[Observer]

    @property
    def request_schema(self) -> dict[str, Any] | None:
        """JSON Schema of a request; None before it is known."""

    @property
    def status(self) -> RunnerStatus:
        """A snapshot of now."""

    def submit(
        self,
        payload: Mapping[str, Any],
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        streaming: bool = False,
        images: str = "pixels",
        request_id: str | None = None,
        caller: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Ticket:
        """Queue a request; raises NotReady, QueueFull, Draining or InvalidPayload at once."""

    def cancel(self, request_id: str) -> bool:
        """Cancel a waiting or running request; False when there is none of that id."""

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, wait for the others, cancel those that remain."""

    async def stop(self, timeout: float = 10.0) -> None:
        """End every rank, by force after ``timeout`` seconds."""


class Service:
    """One runner, or an App and the runners that it starts.

    Args:
        settings: of the container.
        start: brings it up; raises what went wrong.
        stop: takes it down; never called before ``start`` has ended.
        leave: told at once when the process is asked to stop; must not block.
        runner: the one runner of a worker-only service: ``POST /`` and ``POST /stream`` go to it.
        router: an App's own endpoints.
        title: shown in OpenAPI.
        description: shown in OpenAPI.
    """

    def __init__(
        self,
        settings: RunnerSettings,
        *,
        start: Callable[[], Coroutine[Any, Any, None]],
        stop: Callable[[], Coroutine[Any, Any, None]],
        leave: Callable[[], None] | None = None,
        runner: Runner | None = None,
        router: APIRouter | None = None,
        title: str = "",
        description: str = "",
    ) -> None:
        self.settings = settings
        self.start = start
        self.stop = stop
        self.leave = leave
        self.runner = runner
        self.router = router
        self.title = title or settings.app_id
        self.description = description
        self.observers: list[Observer] = []
        self.board = Board(self)
        self.observers.append(self.board)

    def runners(self) -> list[Runner]:
        """The runners there are now; each is being watched from here on."""
        found = [self.runner] if self.runner is not None else cast("list[Runner]", list(context.runners))
        for runner in found:
            for observer in self.observers:
                if observer not in runner.observers:
                    runner.observers.append(observer)
        return found

    def check_accepts(self) -> None:
        """Raise NotReady or Draining unless calls are taken now."""
        phase = self.board.phase
        if phase in (Phase.READY, Phase.LEAVING):
            return
        if phase is Phase.STARTING:
            raise NotReady("the app is starting; its ranks are not ready yet", state="starting", retry_after=2.0)
        if phase is Phase.FAILED:
            raise self.board.failure or NotReady("the app failed", state="failed", retry_after=10.0)
        raise Draining("the app is shutting down", state="draining")


def worker_service(runner: Any, settings: RunnerSettings, *, title: str = "", description: str = "") -> Service:
    """Return the service of a worker class alone: start its ranks, serve ``POST /`` and ``POST /stream``.

    Args:
        runner: a ``DistributedRunner`` that was not started (its ``warmup`` is part of its start).
        settings: of the container; ``setup_args`` and ``startup_timeout`` are used here.
        title: shown in OpenAPI; default: the app's id.
        description: shown in OpenAPI.
    """

    async def start() -> None:
        await runner.start(timeout=settings.startup_timeout, **settings.setup_args)

    async def stop() -> None:
        await runner.stop()

    return Service(settings, start=start, stop=stop, runner=runner, title=title, description=description)


class Board(Observer):
    """The service's phase and a version that grows with every change; whoever waits for a change waits here."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.phase = Phase.STARTING
        self.failure: DrumlineError | None = None
        self.version = 1
        self._changed = asyncio.Event()

    def enter(self, phase: Phase) -> None:
        """Change the phase."""
        self.phase = phase
        self._bump()

    def fail(self, error: BaseException) -> None:
        """Enter the failed phase because of ``error``, which calls are then answered with."""
        self.failure = (
            error if isinstance(error, DrumlineError) else NotReady("the app failed to start", state="failed")
        )
        self.enter(Phase.FAILED)

    def status_changed(self, status: RunnerStatus) -> None:
        """A runner's status changed."""
        self._bump()

    def _bump(self) -> None:
        self.version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, since: int, timeout: float) -> None:
        """Return when the version is not ``since`` (any more), after ``timeout`` seconds, or when all is over."""
        if since == self.version and self.phase not in (Phase.STOPPED, Phase.FAILED):
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when ``condition()`` holds; it is looked at after every change."""
        while not condition():
            await self._changed.wait()

    @property
    def failed(self) -> bool:
        """True when the start failed, or a runner has used up its restart budget."""
        return self.phase is Phase.FAILED or any(r.status.state == "failed" for r in self._service.runners())

    @property
    def ready(self) -> bool:
        """True when requests should be sent here: started, no group restarting, not leaving."""
        return self.phase is Phase.READY and all(r.status.state == "ready" for r in self._service.runners())

    def status(self) -> dict[str, Any]:
        """The JSON object of ``/status``; several runners of an App are shown as one group."""
        parts = [runner.status for runner in self._service.runners()]
        shown: dict[str, Any] = {
            "state": self._state([str(part.state) for part in parts]),
            "version": self.version,
            "worldSize": sum(part.world_size for part in parts),
            "readyRanks": sum(part.ready_ranks for part in parts),
            "ranks": [rank for part in parts for rank in part.to_dict()["ranks"]],
            "restarts": sum(part.restarts for part in parts),
            "lastFailure": None,
            "queueDepth": sum(part.queue_depth for part in parts),
            "inFlight": sum(part.in_flight for part in parts),
            "revision": self._service.settings.revision,
        }
        failures = [part for part in parts if part.last_failure is not None]
        if failures:
            latest = max(failures, key=lambda part: part.last_failure.time if part.last_failure else 0.0)
            shown["lastFailure"] = latest.to_dict()["lastFailure"]
        return shown

    def _state(self, states: list[str]) -> str:
        if self.phase is not Phase.READY and not (self.phase is Phase.STARTING and "failed" in states):
            return "draining" if self.phase is Phase.LEAVING else self.phase.value
        return next((state for state in states if state != "ready"), "ready")
