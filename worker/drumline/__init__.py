"""N ranks, one beat: serve one multi-GPU worker class behind invoke and stream endpoints.

Everything is loaded on first use: ``import drumline`` costs milliseconds and loads neither torch nor FastAPI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drumline import client, distributed, errors, toolkit
    from drumline.app import App, endpoint, wrap_app
    from drumline.context import RequestInfo
    from drumline.contract import RunnerSettings
    from drumline.errors import (
        ConfigurationError,
        ConnectionFailed,
        Draining,
        DrumlineError,
        EncodingError,
        InvalidJson,
        InvalidPayload,
        NotReady,
        QueueFull,
        QueueTimeout,
        RankHung,
        RankLost,
        RequestCancelled,
        RequestTimeout,
        SetupFailed,
        WorkerError,
    )
    from drumline.runner.runner import DistributedRunner, RestartPolicy
    from drumline.worker import DistributedWorker, RequestContext

    __version__: str

_HOMES = {
    "drumline.app": ("App", "endpoint", "wrap_app"),
    "drumline.context": ("RequestInfo",),
    "drumline.contract": ("RunnerSettings",),
    "drumline.errors": (
        "ConfigurationError", "ConnectionFailed", "Draining", "DrumlineError", "EncodingError", "InvalidJson",
        "InvalidPayload", "NotReady", "QueueFull", "QueueTimeout", "RankHung", "RankLost", "RequestCancelled",
        "RequestTimeout", "SetupFailed", "WorkerError",
    ),
    "drumline.runner.runner": ("DistributedRunner", "RestartPolicy"),
    "drumline.worker": ("DistributedWorker", "RequestContext"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("client", "distributed", "errors", "toolkit")

__all__ = [
    "App",
    "ConfigurationError",
    "ConnectionFailed",
    "DistributedRunner",
    "DistributedWorker",
    "Draining",
    "DrumlineError",
    "EncodingError",
    "InvalidJson",
    "InvalidPayload",
    "NotReady",
    "QueueFull",
    "QueueTimeout",
    "RankHung",
    "RankLost",
    "RequestCancelled",
    "RequestContext",
    "RequestInfo",
    "RequestTimeout",
    "RestartPolicy",
    "RunnerSettings",
    "SetupFailed",
    "WorkerError",
    "__version__",
    "client",
    "distributed",
    "endpoint",
    "errors",
    "toolkit",
    "wrap_app",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"drumline.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("drumline")
    else:
        raise AttributeError(f"module 'drumline' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
