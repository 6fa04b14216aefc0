"""Server-sent events: the exact bytes of an event stream, and nothing else.

    event: update        one per streamed result, in order
    id: 0
    data: {...one line of JSON...}

    : ping               a comment, after a while of silence

    event: result        exactly one terminal event: result or error; nothing after it
    id: 1
    data: {...}

Ids count up from 0 within a stream. Clients that ignore event names see the sequence of JSON objects.
"""

from __future__ import annotations

#: A comment line: keeps proxies and clients from giving up on a silent stream. It dispatches no event.
PING = b": ping\n\n"

#: Response headers of every stream. ``no-transform`` and ``X-Accel-Buffering`` keep proxies from collecting events.
HEADERS: tuple[tuple[str, str], ...] = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache, no-transform"),
    ("x-accel-buffering", "no"),
)


def update(id: int, data: bytes) -> bytes:
    """Return the event of the update with number ``id`` (0, 1, ...); ``data`` is its JSON."""
    return _event(b"update", id, data)


def result(id: int, data: bytes) -> bytes:
    """Return the terminal event of a request that succeeded; ``id`` is the number after the last update's."""
    return _event(b"result", id, data)


def error(id: int, data: bytes) -> bytes:
    """Return the terminal event of a request that failed; ``data`` is the problem's JSON (it has an ``error`` key)."""
    return _event(b"error", id, data)


def _event(name: bytes, id: int, data: bytes) -> bytes:
    # A line break would end the data line. In JSON it can only stand between tokens, where a space means the same.
    if b"\n" in data or b"\r" in data:
        data = data.replace(b"\r", b" ").replace(b"\n", b" ")
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name, id, data)
