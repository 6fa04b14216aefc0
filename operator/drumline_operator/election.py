"""Takes part in the election of a leader, and works while it is the leader."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from drumline_operator.cluster import ClusterError, Raw
from drumline_operator.leader import Candidate, Record, record_of, spec_of

log = logging.getLogger(__name__)

#: Seconds for giving the Lease back when the process ends.
_RELEASE: Final = 2.0


class Leases(Protocol):
    """Reads and writes Leases; a write of an object that has changed since it was read raises ``Conflict``."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return the Lease."""
        ...

    async def create(self, manifest: Raw) -> Raw:
        """Make the Lease."""
        ...

    async def replace(self, manifest: Raw) -> Raw:
        """Write the Lease."""
        ...


class Election:
    """Works while it leads.

    Args:
        leases: the API server.
        candidate: decides.
        namespace: of the Lease.
        name: of the Lease.
        retry_period: seconds between two attempts.
        work: what the leader does until it is cancelled.
    """

    def __init__(
        self,
        leases: Leases,
        candidate: Candidate,
        *,
        namespace: str,
        name: str,
        retry_period: float,
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._leases, self._candidate, self._work = leases, candidate, work
        self._namespace, self._name, self._retry = namespace, name, retry_period
        self._lease: Raw | None = None

    async def run(self) -> None:
        """Take part until cancelled; then give the Lease back.

        Raises:
            BaseException: what the work raised.
        """
        task: asyncio.Task[None] | None = None
        clock = asyncio.get_running_loop().time
        try:
            while True:
                await self._attempt(clock)
                if self._candidate.leading(clock()) and task is None:
                    log.info("%s leads", self._candidate.identity)
                    task = asyncio.create_task(self._work(), name="lead")
                if task is not None:
                    # Until the next attempt, the deadline, or the end of the work, which is an error.
                    await asyncio.wait([task], timeout=self._pause(clock()))
                    if task.done():
                        await task
                        return
                    if not self._candidate.leading(clock()):
                        log.warning("%s leads no more", self._candidate.identity)
                        await _end(task)
                        task = None
                        self._candidate.stopped()
                else:
                    await asyncio.sleep(self._pause(clock()))
        finally:
            if task is not None:
                await _end(task)
            await self._release()

    def _pause(self, now: float) -> float:
        pause = self._retry * random.uniform(1.0, 1.2)  # noqa: S311 - spread, not secrecy
        deadline = self._candidate.deadline
        return pause if deadline is None else max(0.0, min(pause, deadline - now))

    async def _attempt(self, clock: Callable[[], float]) -> None:
        """Read the Lease, and write it when it is time to. Bounded, for a leader by its deadline."""
        began = clock()
        try:
            async with asyncio.timeout_at(self._candidate.deadline):
                self._lease = await self._leases.get("Lease", self._namespace, self._name)
                found = record_of(self._lease.get("spec") or {}) if self._lease else None
                write = self._candidate.decide(found, _stamp(), clock())
                if write is not None:
                    await self._write(write.record)
                    self._candidate.wrote(write.record, began)
        except (ClusterError, TimeoutError) as error:
            log.warning("Lease %s/%s: %s", self._namespace, self._name, str(error) or "no answer in time")

    async def _write(self, record: Record) -> None:
        meta: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        manifest = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec_of(record)}
        if self._lease is None:
            self._lease = await self._leases.create(manifest)
            return
        meta["resourceVersion"] = self._lease["metadata"]["resourceVersion"]
        self._lease = await self._leases.replace(manifest)

    async def _release(self) -> None:
        record = self._candidate.release(_stamp())
        if record is None or self._lease is None:
            return
        self._candidate.stopped()
        try:
            async with asyncio.timeout(_RELEASE):
                await self._write(record)
        except (ClusterError, TimeoutError) as error:
            log.warning("the Lease is not given back, others wait until it ends: %s", str(error) or "no answer in time")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
