"""The port: what the runner needs of a channel to one group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from typing_extensions import Buffer

OnMessage = Callable[[int, bytes, list[Any]], None]
OnClosed = Callable[[int], None]


@dataclass(frozen=True)
class RankEnd:
    """How a rank reaches its channel: an inherited descriptor, or an address with keys."""

    descriptor: int | None = None
    address: str = ""
    server_key: str = ""
    public_key: str = ""
    secret_key: str = ""


class Channel(Protocol):
    """One incarnation's channel. All methods are called on the event loop's thread."""

    def open(self, on_message: OnMessage, on_closed: OnClosed) -> None:
        """Begin to deliver. ``on_closed(rank)`` comes after the rank's last message."""

    def rank_end(self, rank: int) -> RankEnd:
        """What the process of ``rank`` is given; its descriptor is closed by :meth:`release_rank_end`."""

    def release_rank_end(self, rank: int) -> None:
        """The rank's process has its copy of the descriptor."""

    def send(self, ranks: Sequence[int], message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Queue one message for each of ``ranks``; never blocks; a lost rank is ignored."""

    def drain(self, rank: int) -> None:
        """The process of ``rank`` has ended: deliver now what it had sent.

        May wait for that, milliseconds as a rule and a second at most.
        """

    def close(self) -> None:
        """Close everything; nothing is delivered afterwards."""
