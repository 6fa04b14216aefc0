"""From settings to something that can be served: which kind of class the target is, on which device, in which process.

The process that serves imports an App (its endpoints run there), but never the module of a worker alone: torch and the
model belong to the ranks.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from drumline import gpus, scan, targets
from drumline.app_kind import kind_of
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, DrumlineError, NotReady, SetupFailed

if TYPE_CHECKING:
    from drumline.app import App
    from drumline.server.service import Service

log = logging.getLogger("drumline")

#: What Kubernetes shows of a termination message.
_LONGEST_MESSAGE = 4096


def build_service(settings: RunnerSettings, *, early: bool = False) -> Service:
    """Return the service of ``settings.target``: an App, or a runner for a worker class; nothing is served yet.

    Args:
        settings: of the container.
        early: of a worker class, let the process that starts ranks import it and torch from now on, beside this process,
            which has its server to import. It ends with this process if the service is never started.

    Raises:
        ConfigurationError: the target cannot be resolved, or a setting does not fit its kind.
    """
    if not settings.target:
        raise ConfigurationError("DRUMLINE_TARGET: no target; set it to module:Class or path.py[:Class]")
    reference = _existing(settings.target)
    kind = scan.kind_of(reference)
    if kind is None:
        # Its base classes come from elsewhere, so only importing it tells.
        kind = "app" if kind_of(targets.resolve(reference)) == "app" else "worker"
    return _app(reference, settings) if kind == "app" else _worker(reference, settings, early)


def _existing(target: str) -> str:
    """The reference of a target, as of now: a relative path must not mean something else after a ``chdir``."""
    parsed = targets.parse(target)
    if parsed.kind == "manifest":
        raise ConfigurationError(
            f"DRUMLINE_TARGET: {target} is a manifest; pass it to `drumline run`, or name its class"
        )
    return parsed.reference


def _worker(reference: str, settings: RunnerSettings, early: bool) -> Service:
    if early:  # before anything else is imported that takes time
        from drumline.runner.nursery_process import Asked, start_early

        start_early(Asked(reference))
    from drumline.runner.runner import DistributedRunner
    from drumline.server.service import worker_service

    runner = DistributedRunner(
        reference,
        world_size=settings.world_size,
        device=settings.device,
        backend=settings.backend,
        max_queue_depth=settings.max_queue_depth,
        hang_timeout=settings.hang_timeout,
        timeout=settings.collective_timeout,
        cancel_grace=settings.cancel_grace,
        restart=settings.restart,
        warmup=settings.warmup_payload,
        revision=settings.revision,
        stream_buffer_bytes=settings.stream_buffer_bytes,
    )
    return worker_service(runner, settings)


def _app(reference: str, settings: RunnerSettings) -> Service:
    return service_of_app(cast("type[App]", targets.resolve(reference)), settings)


def service_of_app(cls: type[App], settings: RunnerSettings) -> Service:
    """Return the service of an App class that this process has imported already.

    Raises:
        ConfigurationError: a setting does not fit an App, or an endpoint cannot be served.
    """
    from drumline.server.apps import app_service

    if settings.setup_args:
        raise ConfigurationError(
            f"setup arguments ({', '.join(settings.setup_args)}) are for workers; setup() of an App takes none, "
            "it passes its own to the runners that it starts"
        )
    if settings.warmup_payload is not None:
        log.warning("the warm-up payload is for workers; an App warms up in its setup()")
    app = cls()
    if "world_size" in settings.model_fields_set:
        app.num_gpus = settings.world_size  # type: ignore[misc]  # this instance's own; the class keeps its default
    return app_service(app, settings)


def fit_to_gpus(settings: RunnerSettings, driver: gpus.Driver | None = None) -> RunnerSettings:
    """Hold the promise of ``num_gpus``: a container that was promised GPUs must not quietly serve from its CPUs.

    Args:
        settings: as given; ``device`` "cpu" is a wish that is granted (test clusters, laptops).
        driver: what the driver says; default: ask it.

    Returns:
        The settings with ``device`` decided and, unless given, ``world_size`` set to ``num_gpus``.

    Raises:
        ConfigurationError: there are fewer GPUs than promised.
    """
    if settings.num_gpus == 0:
        return settings
    changes: dict[str, Any] = {}
    if "world_size" not in settings.model_fields_set:
        changes["world_size"] = settings.num_gpus
    if settings.device != "cpu":
        _check_promise(settings.num_gpus, gpus.look() if driver is None else driver)
        changes["device"] = "cuda"
    return settings.model_copy(update=changes)


def _check_promise(promised: int, driver: gpus.Driver) -> None:
    found = len(driver.gpus)
    if driver.problem or found >= promised:
        return  # what the management library cannot tell, the ranks will find out
    hidden = f" ({driver.hidden} more are hidden by CUDA_VISIBLE_DEVICES)" if driver.hidden else ""
    what = f"{found} CUDA device{'s' if found > 1 else ''}" if found else "no CUDA device"
    raise ConfigurationError(
        f"num_gpus is {promised}, but this process sees {what}{hidden}; give the container its GPUs "
        "(nvidia.com/gpu in its limits, the nvidia runtime class), or set DRUMLINE_DEVICE=cpu to run the ranks on the CPU"
    )


def write_termination_log(error: BaseException, path: str | os.PathLike[str]) -> bool:
    """Leave the reason of the end where Kubernetes picks it up; False when there is no such file to write.

    The first line is for people. Where a rank is to blame, the last line is a JSON object with ``reason``, ``rank``, and, as
    far as they are known, ``exitCode`` and ``signal`` (a number), as in ``lastFailure`` of ``/status``.

    Args:
        error: what went wrong.
        path: the file; it must exist, as it does in a pod, so that no stray file appears elsewhere.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SetupFailed) and error.remote_traceback:
        text += f"\n{error.remote_traceback}"
    data, facts = text.encode("utf-8", "replace"), _facts(error)
    room = _LONGEST_MESSAGE - len(facts)
    if len(data) > room:
        half = room // 2 - 8
        data = data[:half] + b"\n[...]\n" + data[-half:]
    data += facts
    file = Path(path)
    if not file.is_file():
        return False
    try:
        file.write_bytes(data)
    except OSError as failed:
        log.warning("cannot write %s: %s", file, failed.strerror)
        return False
    return True


def _facts(error: BaseException) -> bytes:
    found: dict[str, Any] = {
        "reason": type(error).__name__,
        "rank": getattr(error, "rank", None),
        "exitCode": getattr(error, "exit_code", None),
        "signal": getattr(error, "signal", None),
    }
    if isinstance(error, NotReady) and error.failure is not None:
        found = {key: error.failure.get(key) for key in found}
    if found["rank"] is None:
        return b""
    return b"\n" + json.dumps({key: value for key, value in found.items() if value is not None}).encode()


def failure_of(error: BaseException) -> DrumlineError:
    """Return ``error`` as one of ours, for an exit message."""
    return error if isinstance(error, DrumlineError) else DrumlineError(f"{type(error).__name__}: {error}")
