"""What the person at the keyboard should read."""

from __future__ import annotations


class ClusterError(Exception):
    """Something that cannot go on; the message says what is wrong and what to do about it."""
