"""Exceptions of user code as data."""

from __future__ import annotations

import re
import traceback

import msgspec

from drumline.errors import EncodingError, InvalidPayload
from drumline.protocol import Failure

_LONGEST_MESSAGE = 16 << 10
_LONGEST_TRACEBACK = 64 << 10
#: What gloo and NCCL say when another rank went away: a consequence, never the cause.
_PEER_GONE = re.compile(
    r"Connection (closed|reset) by peer|Connection reset|Broken pipe|remote process (exited|has)|ncclRemoteError"
    r"|Socket (closed|Timeout)|caused pair closure|Read error|Write error",
    re.IGNORECASE,
)
_TRANSPORT = re.compile(r"gloo|nccl|distributed|transport|c10d|store", re.IGNORECASE)


def describe(error: BaseException) -> Failure:
    """Return ``error`` as data; never raises, whatever ``error`` does in its ``__str__``."""
    try:
        message = str(error)
    except Exception as second:
        message = f"<{type(error).__name__} whose __str__ raised {type(second).__name__}>"
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:
        trace = ""
    kind, detail = "worker", b""
    if isinstance(error, InvalidPayload):
        kind, detail = "invalid", msgspec.json.encode(error.detail)
    elif isinstance(error, EncodingError):
        kind = "encoding"
    elif is_peer_gone(error, message):
        kind = "peer"
    name = type(error).__qualname__
    module = type(error).__module__
    return Failure(
        name if module == "builtins" else f"{module}.{name}",
        clean(message[:_LONGEST_MESSAGE]),
        clean(trace[-_LONGEST_TRACEBACK:]),
        detail,
        kind,
    )


def clean(text: str) -> str:
    """Replace lone surrogates, which no encoder takes."""
    return text.encode("utf-8", "replace").decode()


def is_peer_gone(error: BaseException, message: str) -> bool:
    """Whether ``error`` only says that another rank's process went away."""
    return (
        isinstance(error, RuntimeError | ConnectionError)
        and _PEER_GONE.search(message) is not None
        and _TRANSPORT.search(message) is not None
    )
