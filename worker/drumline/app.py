"""``drumline.App``: a class with ``setup()`` and endpoints, served over HTTP; the way to put code around a runner."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from drumline import context
from drumline.context import RequestInfo
from drumline.contract import ENV_PREFIX, RESERVED_PATHS, RunnerSettings
from drumline.details import did_you_mean
from drumline.errors import ConfigurationError, SetupFailed

_log = logging.getLogger("drumline.app")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_MARK = "__drumline_endpoint__"
#: On one machine nobody balances load, and whoever presses Ctrl-C is waiting.
_LOCAL: dict[str, Any] = {"any_id": True, "drain_delay": 0.0, "drain_timeout": 30.0}

#: Class keywords that are not attributes of their own: what a hosted platform asks about environments and machines.
_PLATFORM_KEYWORDS = frozenset(
    {
        "channels", "compile_bytecode", "env_dict", "env_yml", "env_yml_str", "exposed_port", "force", "host_kwargs",
        "machine_types", "metadata", "packages", "pip", "private_logs", "python_version", "resolver", "serve",
        "setup_function",
    }
)  # fmt: skip


class App:
    """Base class of apps. Define ``setup()``, decorate methods with :func:`endpoint`, serve with ``drumline run``.

    The settings below are class attributes; each may also be given as a class keyword
    (``class Sdxl(drumline.App, num_gpus=2)``). Three mean something on any machine:

    Attributes:
        num_gpus: how many GPUs the app wants; pass it on as ``DistributedRunner(world_size=self.num_gpus)``.
        requirements: pip requirements. They are compared with what is installed; a difference is one warning.
        startup_timeout: bound on ``setup()`` in seconds; None: the server's own setting.
        app_name: name of the app (class keyword ``name``); None: made from the file's name.

    The others belong to a platform that rents machines and scales apps. They are accepted, so that an app moves
    unchanged, and have no effect here: ``machine_type``, ``keep_alive``, ``min_concurrency``, ``max_concurrency``,
    ``concurrency_buffer``, ``concurrency_buffer_perc``, ``scaling_delay``, ``max_multiplexing``, ``regions``,
    ``request_timeout``, ``request_start_timeout``, ``termination_grace_period_seconds``, ``metrics_port``,
    ``app_auth``, ``app_files``, ``app_files_ignore``, ``app_files_context_dir``, ``requirements_context_dir``,
    ``local_python_modules``, ``local_file_path``, ``kind``, ``image``, ``secrets``, ``data_mounts``,
    ``retry_config``, ``skip_retry_conditions``. On Kubernetes the DistributedApp manifest says these things.

    Raises:
        TypeError: a class keyword that nobody knows (at class definition).
    """

    num_gpus: ClassVar[int] = 1
    requirements: ClassVar[list[Any]] = []
    startup_timeout: ClassVar[float | None] = None
    app_name: ClassVar[str | None] = None

    machine_type: ClassVar[Any] = "S"
    keep_alive: ClassVar[int] = 60
    min_concurrency: ClassVar[int | None] = None
    max_concurrency: ClassVar[int | None] = None
    concurrency_buffer: ClassVar[int | None] = None
    concurrency_buffer_perc: ClassVar[int | None] = None
    scaling_delay: ClassVar[int | None] = None
    max_multiplexing: ClassVar[int | None] = None
    regions: ClassVar[list[str] | None] = None
    request_timeout: ClassVar[int | None] = None
    request_start_timeout: ClassVar[int | None] = None
    termination_grace_period_seconds: ClassVar[int | None] = None
    metrics_port: ClassVar[int | None] = None
    app_auth: ClassVar[str | None] = None
    app_files: ClassVar[list[str]] = []
    app_files_ignore: ClassVar[list[str]] = []
    app_files_context_dir: ClassVar[str | None] = None
    requirements_context_dir: ClassVar[str | None] = None
    local_python_modules: ClassVar[list[str]] = []
    local_file_path: ClassVar[str | None] = None
    kind: ClassVar[str | None] = None
    image: ClassVar[Any] = None
    secrets: ClassVar[list[str] | None] = None
    data_mounts: ClassVar[list[str] | None] = None
    retry_config: ClassVar[Any] = None
    skip_retry_conditions: ClassVar[list[str] | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__()
        if "name" in keywords:
            cls.app_name = keywords.pop("name")
        for keyword, value in keywords.items():
            if keyword in App.__annotations__:
                setattr(cls, keyword, value)
            elif keyword not in _PLATFORM_KEYWORDS:
                hint = did_you_mean(keyword, [*App.__annotations__, *_PLATFORM_KEYWORDS, "name"])
                raise TypeError(f"class {cls.__name__}: drumline.App has no setting {keyword!r}{hint}")

    # -- to override

    def setup(self) -> Any:
        """Prepare the app, sync or async, before it takes requests: start runners, load models."""

    def teardown(self) -> Any:
        """Release what ``setup()`` took, sync or async. Runners that are still up are stopped after it."""

    def handle_exit(self) -> None:
        """Called when the process was asked to stop, before requests in flight are waited for. Must not block."""

    def provide_hints(self) -> list[str]:
        """Words that a router may use to prefer this replica (e.g. the model that is loaded).

        They are sent with every answer of an endpoint, in the headers ``X-Drumline-Hints`` and
        ``X-Fal-Runner-Hints``. Not overridden: no header.
        """
        return []

    # -- to use

    @property
    def current_request(self) -> RequestInfo | None:
        """The request that the running code serves: ``request_id``, ``caller``, ``headers``; None outside of one."""
        return context.current_request.get()


def endpoint(path: str) -> Callable[[_Function], _Function]:
    """Serve the decorated method of an App at ``POST path``.

    Its parameters and return annotation work as in FastAPI: a pydantic model is the JSON body, ``request: Request``
    and ``response: Response`` are passed in, a returned ``Response`` is sent as it is. Sync methods run in a thread.

    Args:
        path: absolute, e.g. ``/`` or ``/stream``. ``/`` and ``/stream`` replace the routes made for a bare worker.

    Raises:
        ConfigurationError: ``path`` is not an absolute path, or the method has one already.
    """
    if not isinstance(path, str) or not path.startswith("/"):
        raise ConfigurationError(f"endpoint({path!r}): a path starts with '/', e.g. @drumline.endpoint('/')")

    def mark(function: _Function) -> _Function:
        if hasattr(function, _MARK):
            raise ConfigurationError(f"{function.__qualname__} already serves {getattr(function, _MARK)}")
        setattr(function, _MARK, path)
        return function

    return mark


def wrap_app(cls: type[App]) -> Callable[[], None]:
    """Return a function that serves the app on this machine until it is told to stop: the last lines of a script.

    .. code-block:: python

        if __name__ == "__main__":
            drumline.wrap_app(MyApp)()

    Address, certificate and everything else come from ``DRUMLINE_*`` variables, e.g. ``DRUMLINE_PORT``. Any
    ``/{namespace}/{name}`` is answered. The function raises ``SystemExit`` when the app cannot be served (1) or a
    variable is wrong (2).

    Raises:
        ConfigurationError: ``cls`` is no App, or its endpoints are wrong.
    """
    if not (isinstance(cls, type) and issubclass(cls, App)):
        raise ConfigurationError(f"wrap_app() takes a subclass of drumline.App, not {cls!r}")
    endpoints(cls)

    def serve() -> None:
        from drumline import host, logs
        from drumline.cli.output import report
        from drumline.cli.ready import Loading
        from drumline.server.serve import run

        try:
            mine = {"name": cls.app_name, **_LOCAL}
            unsaid = {name: value for name, value in mine.items() if ENV_PREFIX + name.upper() not in os.environ}
            settings = RunnerSettings.from_env(os.environ, **unsaid)
            logs.configure(settings.log_format, settings.log_level)
            service = host.service_of_app(cls, settings)
            loading = Loading(service, settings, logs.shows_text(settings.log_format))
            with loading.shown():
                ended = run(service, on_bound=loading.bound, on_ready=loading.ready)
        except ConfigurationError as error:
            raise SystemExit(report(error)) from None
        if ended.error is not None:
            raise SystemExit(report(host.failure_of(ended.error)))

    return serve


# --- for the server


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint: the path and the name of the App's method."""

    path: str
    method: str


def endpoints(cls: type[App]) -> list[Endpoint]:
    """Return the endpoints of an App class, sorted by path.

    Raises:
        ConfigurationError: two methods have the same path, or a path belongs to the server.
    """
    found: dict[str, str] = {}
    for name, value in inspect.getmembers_static(cls):
        path = getattr(value, _MARK, None) if inspect.isroutine(value) else None
        if path is None:
            continue
        if path in found:
            raise ConfigurationError(f"{cls.__name__}.{found[path]} and {cls.__name__}.{name} both serve {path}")
        for reserved in RESERVED_PATHS:
            if path == reserved or path.startswith(reserved + "/"):
                raise ConfigurationError(
                    f"{cls.__name__}.{name}: {reserved} belongs to the server; choose another path than {path}"
                )
        found[path] = name
    return [Endpoint(path, found[path]) for path in sorted(found)]


async def open_app(app: App, settings: RunnerSettings) -> None:
    """Compare requirements, then run ``setup()`` within its time.

    Args:
        app: a new instance.
        settings: of the process. They hold for the runners that ``setup()`` makes, as far as it leaves parameters out;
            the class's ``startup_timeout`` wins over theirs.

    Raises:
        SetupFailed: it took longer. What ``setup()`` itself raises comes through unchanged.
    """
    from drumline.requirements import differences

    name = type(app).__name__
    if different := differences(app.requirements):
        _log.warning("%s asks for other packages than are installed: %s", name, "; ".join(different))
    context.use_preset(
        context.Preset(
            device=settings.device,
            backend=settings.backend,
            max_queue_depth=settings.max_queue_depth,
            hang_timeout=settings.hang_timeout,
            collective_timeout=settings.collective_timeout,
            cancel_grace=settings.cancel_grace,
            restart=settings.restart,
            revision=settings.revision,
            stream_buffer_bytes=settings.stream_buffer_bytes,
        )
    )
    limit = app.startup_timeout or settings.startup_timeout
    try:
        async with asyncio.timeout(limit) as bound:
            await _call(app.setup)
    except TimeoutError:
        if not bound.expired():
            raise
        raise SetupFailed(
            f"setup() of {name} took longer than startup_timeout ({limit:g} s)",
            rank=-1,
            exception_type="TimeoutError",
        ) from None


async def close_app(app: App) -> None:
    """Run ``teardown()``, then stop every runner of this process, whatever teardown did."""
    try:
        await _call(app.teardown)
    finally:
        for runner in list(context.runners):
            await runner.stop()


def hints(app: App) -> str | None:
    """The value of the hint headers: comma-separated words, None when the app gives no hints."""
    if type(app).provide_hints is App.provide_hints:
        return None
    try:
        given = list(app.provide_hints())
    except Exception:
        _log.exception("provide_hints() of %s failed", type(app).__name__)
        return None
    fit = [hint for hint in given if hint.isprintable() and hint.isascii() and "," not in hint]
    if len(fit) < len(given):
        _log.warning("hints of %s that do not fit a header are left out", type(app).__name__)
    return ",".join(fit)


async def _call(function: Callable[[], Any]) -> None:
    if inspect.iscoroutinefunction(function):
        await function()
        return
    result = await asyncio.to_thread(function)
    if inspect.isawaitable(result):
        await result
