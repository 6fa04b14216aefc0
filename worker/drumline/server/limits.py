"""Bounds on what a client may send, and how slowly. Sizes in bytes, times in seconds."""

from __future__ import annotations

import re

from drumline.runner import request_ids

#: Request line and headers together, and how many headers there may be. More is answered with 431.
MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
#: Requests that may wait on a connection for the answer of the one before.
MAX_PIPELINED = 32
#: Bytes of such requests that are read. Beyond them a client that leaves is noticed only when it is answered.
MAX_WAITING_BYTES = 64 << 10
#: From the first byte of a request (or the connection) until its headers are complete; then the connection is closed.
HEAD_SECONDS = 20.0
#: Silence while a body arrives; more is answered with 408.
BODY_IDLE_SECONDS = 30.0
#: The whole body must arrive at this rate or better, after a first minute.
BODY_GRACE_SECONDS = 60.0
BODY_BYTES_PER_SECOND = 64 << 10
#: After an early answer (413, 415) the rest of the body is read and dropped this long: the client sees the answer.
LINGER_SECONDS = 10.0
#: A client that takes nothing of its response for this long is disconnected.
STALL_SECONDS = 300.0
#: Responses are handed to the socket in parts of this size, each waiting for the one before.
CHUNK_BYTES = 256 << 10
#: A call of up to this size is begun in the turn of the event loop in which it came, all others in a task of their own.
AT_ONCE_BYTES = 64 << 10
#: A kept-alive connection without a request is closed after this long.
KEEP_ALIVE_SECONDS = 75.0

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id(*offered: bytes | None) -> str:
    """Return the first of ``offered`` that is a sane token (1 to 128 of ``A-Za-z0-9._-``), else a new random id."""
    for raw in offered:
        if raw is not None and _ID.fullmatch(text := raw.decode("latin-1")):
            return text
    return request_ids.new()


def body_deadline(max_bytes: int) -> float:
    """Seconds that a body of up to ``max_bytes`` may take in all."""
    return BODY_GRACE_SECONDS + max_bytes / BODY_BYTES_PER_SECOND
