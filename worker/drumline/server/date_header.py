"""The date header, made anew when a request comes in another second: an idle server has no clock to turn."""

from __future__ import annotations

import functools
import time
from email.utils import formatdate


def headers() -> list[tuple[bytes, bytes]]:
    """Return the header of this second, for uvicorn."""
    return _of(int(time.time()))[0]


def line() -> bytes:
    """Return the same as it is on the wire."""
    return _of(int(time.time()))[1]


@functools.lru_cache(maxsize=1)
def _of(second: int) -> tuple[list[tuple[bytes, bytes]], bytes]:
    value = formatdate(second, usegmt=True).encode()
    return [(b"date", value)], b"date: " + value + b"\r\n"
