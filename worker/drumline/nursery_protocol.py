"""The closed vocabulary between the runner and the nursery (the process that is every rank's parent). PURE.

Frames as in ``drumline.framing``, without buffers; ``Spawn`` carries descriptors: the rank's channel end (when it has
one), the shared page, its output pipe, its stacks pipe, in this order.
"""

from __future__ import annotations

import msgspec

from drumline.protocol import Failure


class Preload(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Import torch and the worker's module once. ``method``: auto, fork or spawn."""

    reference: str
    path: list[str]
    cwd: str
    method: str = "auto"


class RankConfig(msgspec.Struct, array_like=True, frozen=True):
    """What one rank process is told before its first message."""

    reference: str
    rank: int
    world_size: int
    device: str
    backend: str
    store: str
    collective_timeout: float
    environment: dict[str, str]
    address: str = ""
    server_key: str = ""
    public_key: str = ""
    secret_key: str = ""


class Spawn(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Start one rank of ``incarnation``."""

    incarnation: int
    config: RankConfig
    has_channel: bool


class Signal(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Send ``signal`` to the ranks of ``incarnation`` (with SIGKILL: to their process groups)."""

    incarnation: int
    signal: int


RunnerRequest = Preload | Spawn | Signal


class Preloaded(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """The module is imported. ``schema``: JSON Schema of the worker's ``__call__``, as JSON; ``method``: fork or spawn."""

    kind: str  # worker | app
    reference: str
    schema: bytes
    method: str
    reason: str
    seconds: float
    doc: str = ""


class PreloadFailed(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """Importing raised."""

    failure: Failure


class Spawned(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """The rank has a process now."""

    incarnation: int
    rank: int
    pid: int


class Exited(msgspec.Struct, array_like=True, tag=14, frozen=True):
    """A rank's process ended and was reaped."""

    incarnation: int
    rank: int
    exit_code: int | None
    signal: int | None


class Paused(msgspec.Struct, array_like=True, tag=15, frozen=True):
    """A rank was stopped (SIGSTOP) or, with ``paused`` False, continued."""

    incarnation: int
    rank: int
    paused: bool


NurseryReport = Preloaded | PreloadFailed | Spawned | Exited | Paused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(RunnerRequest).decode
decode_report = msgspec.msgpack.Decoder(NurseryReport).decode
