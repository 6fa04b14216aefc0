"""Names for requests that came without one: 128 random bits in hex, drawn in bulk because each draw is a system call."""

from __future__ import annotations

import os

_BULK = 256
_pool: list[str] = []


def new() -> str:
    """Return a new request id."""
    if not _pool:
        text = os.urandom(16 * _BULK).hex()
        _pool.extend(text[i : i + 32] for i in range(0, len(text), 32))
    return _pool.pop()
