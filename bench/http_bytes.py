"""As much of HTTP/1.1 as the load clients need."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Head:
    """The head of an answer.

    Attributes:
        status: e.g. 200.
        length: bytes of the body; None when it comes in chunks.
        size: bytes of the head itself.
    """

    status: int
    length: int | None
    size: int


def head_of(data: bytes) -> Head | None:
    """Read the head that ``data`` begins with; None while it is not complete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    length = _LENGTH.search(data, 0, end)
    return Head(int(data[9:12]), None if length is None else int(length[1]), end + 4)


def post(path: str, body: bytes) -> bytes:
    """Return a request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
