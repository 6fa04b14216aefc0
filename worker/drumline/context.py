"""What the code of one process shares about the request in hand and the runners it has."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from drumline.contract import Backend, Device, RestartSettings


class Running(Protocol):
    """A runner, as far as its process must know it to end it."""

    async def stop(self, timeout: float = 10.0) -> None:
        """End every rank, by force after ``timeout`` seconds."""


@dataclass(frozen=True)
class RequestInfo:
    """The HTTP request that an endpoint serves; ``runner.invoke`` inside it takes over id, caller and headers."""

    request_id: str
    caller: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


current_request: ContextVar[RequestInfo | None] = ContextVar("drumline_request", default=None)

#: Runners that were started in this process and not stopped.
runners: weakref.WeakSet[Running] = weakref.WeakSet()


@dataclass(frozen=True)
class Preset:
    """Parameters of runners whose maker left them out; see ``DistributedRunner``."""

    device: Device = "auto"
    backend: Backend = "auto"
    max_queue_depth: int = 64
    hang_timeout: float = 900.0
    collective_timeout: float = 86400.0
    cancel_grace: float = 10.0
    restart: RestartSettings | None = None
    revision: str = ""
    stream_buffer_bytes: int = 256 << 20


_BUILT_IN = Preset()
_preset: ContextVar[Preset] = ContextVar("drumline_preset", default=_BUILT_IN)


def preset() -> Preset:
    """Return what holds here: inside of an App's ``setup()`` the settings of its server."""
    return _preset.get()


def use_preset(values: Preset) -> None:
    """Let ``values`` hold for the rest of this task and for what it starts."""
    _preset.set(values)
