"""Names that two sides must spell alike: ports, paths, environment variables, and the class of settings behind them.

The operator builds a :class:`RunnerSettings` and calls :meth:`RunnerSettings.to_env`; the container calls
:meth:`RunnerSettings.from_env`. Nobody writes a ``DRUMLINE_*`` variable by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drumline.errors import ConfigurationError

DEFAULT_PORT = 8080
ENV_PREFIX = "DRUMLINE_"
REQUEST_ID_HEADER = "X-Request-Id"
#: Routes that belong to the server; an App may not declare them.
RESERVED_PATHS = ("/healthz", "/startupz", "/readyz", "/status", "/metrics", "/openapi.json", "/docs", "/requests")

Device = Literal["auto", "cuda", "cpu"]
Backend = Literal["auto", "nccl", "gloo"]


class RestartSettings(BaseModel):
    """How often a group may be restarted before the runner gives up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_restarts: int = Field(default=10, ge=0, description="restarts allowed within the window; 0 never restarts")
    window_seconds: float = Field(default=3600.0, gt=0, description="length of the sliding window")
    backoff_seconds: float = Field(
        default=0.5, ge=0, description="wait before the second restart without a served request between; doubles"
    )
    max_backoff_seconds: float = Field(default=30.0, ge=0, description="upper bound of that wait")


class RunnerSettings(BaseModel):
    """Everything the worker container is told from outside. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(default="", description="module:Class or path.py[:Class] of the worker or App")
    namespace: str = Field(default="default", description="first part of the app id")
    name: str = Field(default="app", description="second part of the app id")
    revision: str = Field(default="", description="shown in /status")
    setup_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of setup()")
    warmup_payload: dict[str, Any] | None = Field(default=None, description="invoked once before the app is ready")
    world_size: int = Field(default=1, ge=1, le=1024, description="ranks of the group")
    num_gpus: int = Field(default=0, ge=0, le=1024, description="GPUs promised to this process; 0 for CPU apps")
    device: Device = Field(default="auto", description="cuda, cpu, or auto: cuda when there are enough GPUs")
    backend: Backend = Field(default="auto", description="torch.distributed backend; auto: nccl on cuda, gloo on cpu")

    host: str = Field(default="127.0.0.1", description="address the HTTP server binds")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="port the HTTP server binds; 0 picks one")
    any_id: bool = Field(default=False, description="answer to every /{namespace}/{name}, not only to our own")
    tls_cert: str | None = Field(default=None, description="PEM file; serves https together with tls_key")
    tls_key: str | None = Field(default=None, description="PEM file")
    api_keys: tuple[str, ...] = Field(default=(), description="accepted API keys; empty: no authentication")
    debug: bool = Field(default=False, description="tracebacks in problem bodies")
    log_format: Literal["auto", "text", "json"] = Field(default="auto", description="auto: text on a TTY, else json")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level shown")

    files: str = Field(
        default="", description="where drumline.toolkit keeps files: data:, dir:/folder?url=... or s3://bucket/prefix"
    )
    allow_private_urls: bool = Field(
        default=False, description="drumline.toolkit may download from loopback and private addresses"
    )

    termination_log: str = Field(
        default="/dev/termination-log", description="file that gets the last failure, if it exists"
    )

    startup_timeout: float = Field(default=1800.0, gt=0, description="bound on setup() and the warm-up together")
    request_timeout: float = Field(default=3600.0, gt=0, description="bound on one request's run time")
    queue_timeout: float = Field(default=600.0, gt=0, description="bound on one request's wait in the queue")
    max_queue_depth: int = Field(default=64, ge=0, description="waiting requests; one more is refused with 429")
    max_body_bytes: int = Field(default=64 << 20, ge=1, description="largest request body")
    max_bodies_bytes: int = Field(
        default=1 << 30,
        ge=1,
        description="request bodies over 64 KiB that arrive, wait or run, together; at least 4 times max_body_bytes count",
    )
    max_connections: int = Field(
        default=2048, ge=8, description="open client connections; one more cuts the one that has waited longest"
    )
    stream_keepalive: float = Field(default=15.0, gt=0, description="longest silence in an event stream")
    stream_buffer_bytes: int = Field(
        default=256 << 20, ge=1, description="updates kept for a client that reads slowly; more ends its stream"
    )
    hang_timeout: float = Field(default=900.0, gt=0, description="a rank without a heartbeat for this long is hung")
    collective_timeout: float = Field(
        default=86400.0,
        gt=0,
        le=1e9,
        description="bound on one collective of the ranks' process group; by default the time-outs above come first",
    )
    cancel_grace: float = Field(default=10.0, ge=0, description="time for ranks to come back after a cancel or error")
    drain_delay: float = Field(default=3.0, ge=0, description="after SIGTERM keep accepting this long, unready")
    drain_timeout: float = Field(default=600.0, ge=0, description="time for requests in flight after that")
    restart: RestartSettings = Field(default_factory=RestartSettings, description="how often a group may be restarted")

    @property
    def app_id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def to_env(self) -> dict[str, str]:
        """Return the ``DRUMLINE_*`` variables for every field that differs from its default."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {
            ENV_PREFIX + name.upper(): value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            for name, value in values.items()
        }

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **overrides: Any) -> RunnerSettings:
        """Read the settings from ``environ``; ``overrides`` (None is ignored) win.

        Raises:
            ConfigurationError: a variable is unknown or has a bad value; the message names it.
        """
        values: dict[str, Any] = {}
        for name, text in environ.items():
            if not name.startswith(ENV_PREFIX):
                continue
            field = name.removeprefix(ENV_PREFIX).lower()
            if field not in cls.model_fields:
                raise ConfigurationError(f"{name}: no such setting; known are {', '.join(sorted(_env_names(cls)))}")
            values[field] = _parse(name, text, cls.model_fields[field].annotation)
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls.checked(values)

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> RunnerSettings:
        """Validate ``values``; a bad one is a :class:`ConfigurationError` naming the variable and the cure."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [
                f"{ENV_PREFIX}{str(e['loc'][0]).upper()}{''.join(f'.{p}' for p in e['loc'][1:])}: {e['msg']}"
                for e in error.errors()
            ]
            raise ConfigurationError("; ".join(lines)) from None


def _env_names(cls: type[BaseModel]) -> list[str]:
    return [ENV_PREFIX + name.upper() for name in cls.model_fields]


def _parse(name: str, text: str, annotation: Any) -> Any:
    if annotation in (str, str | None) or getattr(annotation, "__origin__", None) is Literal:
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigurationError(f"{name}: {text!r} is not JSON; write e.g. 8, true or {{}}") from None
