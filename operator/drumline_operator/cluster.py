"""The port to the cluster: what ``reconcile`` needs of an API server, and how that fails. No adapter is known here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Raw = Mapping[str, Any]


class ClusterError(Exception):
    """The cluster did not do what it was asked for. Trying again later may help."""


class Conflict(ClusterError):
    """Somebody else changed the object first (409), or it is not the one that was meant."""


class Forbidden(ClusterError):
    """The operator may not do this (403); the message names the verb and the resource."""


class Refused(ClusterError):
    """The API server does not take this manifest (400, 422); trying again does not help."""


class Throttled(ClusterError):
    """Too many requests (429). ``retry_after``: seconds, as the server says."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Expired(ClusterError):
    """What was asked to go on from is too old (410): list anew."""


class Unavailable(ClusterError):
    """No answer in time, a broken connection, or an error of the server's own (5xx). It may have been done anyway."""


class Cluster(Protocol):
    """An API server, and the runners in pods. Every call is bounded in time and may raise :class:`ClusterError`."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return an object, or None when there is none."""
        ...

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Raw]:
        """Return all objects of a kind that carry the labels of ``selector``."""
        ...

    async def apply(self, manifest: Raw) -> object:
        """Make an object be like ``manifest``: server-side apply, as the operator, with force."""
        ...

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, orphan: bool = False) -> object:
        """Delete an object if it has this uid; one that is gone already is no error. ``orphan``: what it owns stays."""
        ...

    async def set_status(self, raw: Raw, status: Raw) -> object:
        """Write the status of the DistributedApp or MachineType ``raw``, if it has not changed since it was read."""
        ...

    async def event(self, raw: Raw, type: str, reason: str, message: str) -> None:
        """Attach an event to ``raw``."""
        ...

    async def pod_warnings(self, namespace: str, uid: str) -> Sequence[Raw]:
        """Return the Warning events about a pod, from all that are still kept."""
        ...

    async def runner_status(self, pod: Raw, port: int) -> Raw | None:
        """Return what the runner in ``pod`` says about its ranks, or None when it does not answer."""
        ...
