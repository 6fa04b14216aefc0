"""A worker that writes to its channel itself, whatever it is told to: for tests of what the runner does about it."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

from drumline.rank.link import LocalLink
from drumline.worker import DistributedWorker


class Babbler(DistributedWorker):
    """Sends what the payload says past the protocol, then returns its ``answer``."""

    def __call__(
        self,
        streaming: bool = False,
        rank: int = -1,
        raw: bytes = b"",
        frames: list[bytes] | None = None,
        messages: list[bytes] | None = None,
        descriptors: int = 0,
        answer: str = "",
    ) -> dict[str, Any]:
        """Speak on ``rank``.

        Args:
            streaming: unused.
            rank: who speaks.
            raw: bytes for the stream of a socket pair.
            frames: frames of one message of a ZeroMQ channel.
            messages: whole messages for either.
            descriptors: files that are sent along with nothing.
            answer: comes back in the result.
        """
        if self.rank == rank:
            link = _link()
            for message in messages or []:
                link.send(message)
            if frames:
                link._transmit(list(frames))
            if raw:
                _send_all(link._socket, raw)
            for _ in range(descriptors):
                null = os.open(os.devnull, os.O_RDONLY)
                socket.send_fds(link._socket, [_HALF_A_PREFIX], [null])
                os.close(null)
        return {"answer": answer}


#: What follows it is never complete, so that no frame takes the descriptors.
_HALF_A_PREFIX = b"\xff\xff\xff\x03"


def _send_all(sock: socket.socket, data: bytes) -> None:
    for at in range(0, len(data), 60_000):
        sock.send(data[at : at + 60_000])


def _link() -> Any:
    """This rank's end of its channel."""
    from drumline.rank.remote import RemoteLink

    return next(each for each in gc.get_objects() if isinstance(each, LocalLink | RemoteLink))
