"""Exceptions of user code as data."""

from __future__ import annotations

import contextlib
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
    """Return ``error`` as data; never raises, whatever ``error`` and its class do when they are asked."""
    message = _message(error)
    kind, detail = "worker", b""
    if isinstance(error, InvalidPayload):
        kind, detail = "invalid", _detail(error, message)
    elif isinstance(error, EncodingError):
        kind = "encoding"
    elif is_peer_gone(error, message):
        kind = "peer"
    return Failure(_type_name(error), message, _trace(error), detail, kind)


def _message(error: BaseException) -> str:
    try:
        return clean(str(error), _LONGEST_MESSAGE)
    except BaseException as second:
        return f"<{_type_name(error)} whose __str__ raised {type(second).__name__}>"


def _trace(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(error)
    except BaseException:
        try:  # its text is to blame, or a chain too long; where it was raised is known all the same
            lines = [*traceback.format_tb(error.__traceback__), f"{_type_name(error)}: {_message(error)}"]
        except BaseException:
            return ""
    return clean("".join(lines)[-_LONGEST_TRACEBACK:], _LONGEST_TRACEBACK)


def _type_name(error: BaseException) -> str:
    kind = type(error)
    name = type.__getattribute__(kind, "__qualname__")
    module = type.__getattribute__(kind, "__module__")
    return clean(name if module == "builtins" or type(module) is not str else f"{module}.{name}", _LONGEST_MESSAGE)


def _detail(error: InvalidPayload, message: str) -> bytes:
    with contextlib.suppress(BaseException):  # user code may raise this class with anything in it
        if type(error.detail) is list and all(type(item) is dict for item in error.detail):
            return msgspec.json.encode(error.detail, enc_hook=str)
    return msgspec.json.encode(InvalidPayload(message).detail)


def clean(text: str, limit: int) -> str:
    """Return the first ``limit`` characters as a plain str without lone surrogates, which no encoder takes."""
    return str.__str__(text)[:limit].encode("utf-8", "replace").decode()


def is_peer_gone(error: BaseException, message: str) -> bool:
    """Whether ``error`` only says that another rank's process went away."""
    return (
        isinstance(error, RuntimeError | ConnectionError)
        and _PEER_GONE.search(message) is not None
        and _TRANSPORT.search(message) is not None
    )
