"""The runner's status: what ``/status`` shows."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

from drumline.errors import DrumlineError, RankHung, RankLost, SetupFailed, WorkerError


class RankStatus(msgspec.Struct, rename="camel"):
    """One rank. ``state``: starting, ready, busy, paused or lost. ``step``: of the request it runs."""

    rank: int
    pid: int | None = None
    state: str = "starting"
    device: str = ""
    step: int = 0
    rss_bytes: int | None = None


class FailureStatus(msgspec.Struct, rename="camel"):
    """The last failure of the group. ``time``: UNIX seconds. ``stacks``: text per rank, for a hung group."""

    reason: str
    message: str
    time: float
    rank: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    exception_type: str = ""
    traceback: str = ""
    stacks: dict[int, str] = {}


class RunnerStatus(msgspec.Struct, rename="camel"):
    """A snapshot; ``version`` grows with every change that a watcher should see."""

    state: str
    version: int
    world_size: int
    ready_ranks: int
    ranks: list[RankStatus]
    restarts: int
    last_failure: FailureStatus | None
    queue_depth: int
    in_flight: int
    revision: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``/status``."""
        built: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        return built


def failure_status(error: DrumlineError, time: float) -> FailureStatus:
    """Return ``error`` as status, at UNIX second ``time``."""
    status = FailureStatus(type(error).__name__, str(error), time)
    if isinstance(error, SetupFailed | WorkerError):
        status.rank, status.exception_type, status.traceback = error.rank, error.exception_type, error.remote_traceback
    elif isinstance(error, RankLost):
        status.reason, status.rank = error.reason, error.rank
        status.exit_code, status.signal = error.exit_code, error.signal
    elif isinstance(error, RankHung):
        status.rank, status.stacks = error.rank, error.stacks
    return status


def resident_bytes(pid: int | None) -> int | None:
    """Return the resident set size of ``pid``, or None where ``/proc`` is missing or the process is gone."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/statm") as file:  # a Path would intern every pid
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


class Watch:
    """A version number and those who wait for the next one."""

    def __init__(self) -> None:
        self.version = 0
        self._watchers: list[asyncio.Future[None]] = []

    def changed(self) -> None:
        """Count one change and wake everybody."""
        self.version += 1
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def wait(self, since: int, timeout: float) -> None:
        """Wait until the version is above ``since``, ``timeout`` seconds at most."""
        try:
            async with asyncio.timeout(timeout):
                while self.version <= since:
                    watcher = asyncio.get_running_loop().create_future()
                    self._watchers.append(watcher)
                    await watcher
        except TimeoutError:
            return
