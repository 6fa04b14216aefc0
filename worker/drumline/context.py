"""What the code of one process shares about the request in hand and the runners it has."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drumline.runner.lifecycle import Lifecycle


@dataclass(frozen=True)
class RequestInfo:
    """The HTTP request that an endpoint serves; ``runner.invoke`` inside it takes over id, caller and headers."""

    request_id: str
    caller: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


current_request: ContextVar[RequestInfo | None] = ContextVar("drumline_request", default=None)

#: Runners that were started in this process and not stopped.
runners: weakref.WeakSet[Lifecycle] = weakref.WeakSet()
