"""What a plan may ask for. PURE: frozen data, performed by ``reconcile``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Apply:
    """Make a child be like ``manifest`` (server-side apply). ``reason``: why, in words."""

    manifest: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Delete:
    """Remove an object, but only this one: ``uid`` must match. ``orphan``: what it owns stays."""

    kind: str
    name: str
    uid: str
    reason: str
    orphan: bool = False


@dataclass(frozen=True)
class SetStatus:
    """Write the whole status."""

    status: Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """Tell people: ``kubectl describe`` shows it."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class RequeueAfter:
    """Look again in ``seconds``: something changes that nobody announces."""

    seconds: float


Action = Apply | Delete | SetStatus | Event | RequeueAfter
