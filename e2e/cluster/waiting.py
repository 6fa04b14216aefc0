"""Bounded waits for parts that give no notice when they are ready."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import ClusterError

#: Seconds between two looks.
INTERVAL = 0.05


def wait_for(
    what: str,
    ready: Callable[[], bool],
    *,
    limit: float,
    watched: Iterable[int] = (),
    dead: Callable[[], str] = str,
    explain: Callable[[], str] = str,
) -> None:
    """Look until `ready()`, at once again when a watched process ends.

    Args:
        what: What is waited for, for the message: "the API server".
        ready: The condition.
        limit: Seconds.
        watched: Pids of processes that must not end meanwhile (Linux only).
        dead: What to say about those that did; empty when none did.
        explain: More for the message when the time is over.

    Raises:
        ClusterError: The time is over, or a watched process ended.
    """
    deadline = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        poller = select.poll()
        for pid in watched:
            with contextlib.suppress(ProcessLookupError):  # gone already: dead() tells
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                poller.register(descriptor, select.POLLIN)
        while not ready():
            if words := dead():
                raise ClusterError(words)
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} did not get ready in {limit:.0f} s\n{explain()}".rstrip())
            poller.poll(INTERVAL * 1000)


def tail(path: Path, lines: int = 20, width: int = 400) -> str:
    """The last lines of a log, cut to `width` characters each."""
    if not path.exists():
        return "(no log)"
    return "\n".join(line[:width] for line in path.read_text(errors="replace").splitlines()[-lines:])
