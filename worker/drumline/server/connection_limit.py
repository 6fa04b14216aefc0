"""How many connections there may be, and who has to leave when there are more.

A connection *waits* unless it has a call in hand that was admitted: it is idle, its request is not complete, or its
answer is. The one that has waited longest is cut for a new one. So whoever opens connections and does nothing with them
only drives out himself and others who do nothing, and health checks always come through.
"""

from __future__ import annotations

import logging
import os
import resource
from typing import Protocol

from drumline import problems

log = logging.getLogger("drumline.server")

#: Descriptors for everything but connections: a new group's sockets, pipes and result memory, files of the app's own.
_SPARE_DESCRIPTORS = 64
_SPARE_PER_RANK = 16
_FEWEST = 8


class Guest(Protocol):
    """A connection, as far as its number is concerned."""

    def abort(self) -> None:
        """Cut it, with whatever is still unsent."""


class ConnectionLimit:
    """Keeps the open connections at ``most``, or one above while a new one is looked at.

    Args:
        most: how many may be open, and how many calls may be in hand.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: dict[Guest, None] = {}  # the longest first
        self._holding: set[Guest] = set()
        self._warned = False

    def opened(self, guest: Guest) -> None:
        """A client connected; another one may have to leave."""
        if len(self._waiting) + len(self._holding) >= self.most and self._waiting:
            leaving = next(iter(self._waiting))
            del self._waiting[leaving]
            leaving.abort()
            # Once, or clients could fill the log.
            log.log(
                logging.DEBUG if self._warned else logging.WARNING,
                "%d connections are open: those that wait longest are cut (DRUMLINE_MAX_CONNECTIONS)",
                self.most,
            )
            self._warned = True
        self._waiting[guest] = None

    def hold(self, guest: Guest) -> None:
        """A call of this connection is admitted: it is not cut for another.

        Raises:
            ProblemError: 503, all connections have a call.
        """
        if guest not in self._waiting:
            return
        if len(self._holding) >= self.most:
            text = f"All {self.most} connections have a request in hand. Try again shortly."
            raise problems.ProblemError(problems.make("too-many-connections", text))
        del self._waiting[guest]
        self._holding.add(guest)

    def release(self, guest: Guest) -> None:
        """The call was answered."""
        if guest in self._holding:
            self._holding.discard(guest)
            self._waiting[guest] = None
        elif guest in self._waiting:  # it did something: others have waited longer
            del self._waiting[guest]
            self._waiting[guest] = None

    def closed(self, guest: Guest) -> None:
        """The connection is gone."""
        self._waiting.pop(guest, None)
        self._holding.discard(guest)


def affordable(most: int, world_size: int) -> int:
    """Return ``most``, or less where this process may not open so many files (``ulimit -n``)."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return most
    taken = len(os.listdir("/dev/fd"))
    left = allowed - taken - _SPARE_DESCRIPTORS - _SPARE_PER_RANK * world_size
    if left < most:
        log.info(
            "up to %d connections instead of DRUMLINE_MAX_CONNECTIONS=%d: this process may open %d files; raise that "
            "with ulimit -n",
            max(left, _FEWEST),
            most,
            allowed,
        )
    return min(most, max(left, _FEWEST))
