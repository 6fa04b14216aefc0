"""The closed vocabulary between the runner and its ranks: msgspec structs, tagged, in msgpack.

A value inside a message is a ``bytes`` made by ``drumline.codec.pack``; large buffers of that value travel beside the
message (shared memory or extra frames, the channel's choice), never inside it. An unknown tag or a bad field is a
``msgspec.ValidationError`` at the boundary.
"""

from __future__ import annotations

from typing import Any

import msgspec

_decode_details = msgspec.json.Decoder(list[dict[str, Any]]).decode


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """An exception as data: qualified type name, text, formatted traceback, and FastAPI-shaped details if it has any."""

    exception_type: str
    message: str
    traceback: str = ""
    detail: bytes = b""  # JSON list of {"loc", "msg", "type"}; only for kind "invalid"
    # worker | invalid (the payload does not fit) | encoding (the result cannot be carried) | peer (another rank is gone)
    kind: str = "worker"

    def __post_init__(self) -> None:
        """Refuse details that are none, so that nobody has to look again."""
        if self.kind == "invalid":
            _decode_details(self.detail)


# --- runner -> rank


class Setup(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Join the process group, build the worker, run ``setup(**kwargs)``, then one warm-up request if there is one.

    ``kwargs``, ``warmup``: packed dicts, without buffers of their own beside the message for ``warmup``.
    """

    kwargs: bytes
    warmup: bytes = b""


class Call(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Run one request.

    ``sequence`` is the request's number in this incarnation (1..2**32-1), also used in the shared page.
    ``images``: "pixels" to send images of the result as raw pixels, else the encoder's name ("jpeg", "png", "webp").
    ``deadline``: UNIX seconds, 0 for none.
    """

    sequence: int
    request_id: str
    payload: bytes
    streaming: bool = False
    images: str = "pixels"
    deadline: float = 0.0
    headers: dict[str, str] = {}


class Teardown(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Run ``teardown()``, leave the process group, exit 0."""


RunnerMessage = Setup | Call | Teardown

# --- rank -> runner


class Ready(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """``setup()`` returned after ``seconds`` on ``device`` with ``backend``."""

    seconds: float
    device: str
    backend: str


class SetupRaised(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """``setup()`` raised; the rank exits next."""

    failure: Failure


class Update(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """One ``add_streaming_result`` or ``progress``: a packed value."""

    sequence: int
    value: bytes


class Returned(msgspec.Struct, array_like=True, tag=14, frozen=True):
    """``__call__`` returned. Only rank 0 sends its value. ``collectives``: the default group's sequence number."""

    sequence: int
    collectives: int
    value: bytes = b""


class Raised(msgspec.Struct, array_like=True, tag=15, frozen=True):
    """``__call__`` raised, its arguments did not fit, or its result cannot be carried."""

    sequence: int
    collectives: int
    failure: Failure


class Stopped(msgspec.Struct, array_like=True, tag=16, frozen=True):
    """``checkpoint()`` raised ``RequestCancelled`` at ``step``."""

    sequence: int
    collectives: int
    step: int


class TornDown(msgspec.Struct, array_like=True, tag=17, frozen=True):
    """``teardown()`` ended; ``failure`` when it raised. The rank exits next."""

    failure: Failure | None = None


RankMessage = Ready | SetupRaised | Update | Returned | Raised | Stopped | TornDown

encode = msgspec.msgpack.Encoder().encode
decode_runner_message = msgspec.msgpack.Decoder(RunnerMessage).decode
decode_rank_message = msgspec.msgpack.Decoder(RankMessage).decode
