"""The rank's end of a local channel: blocking, one reader (the main thread), several senders behind a lock."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import Buffer

from drumline import descriptors, framing
from drumline.segments import SegmentPool, SegmentReader

_CHUNK = 256 << 10


class Link(Protocol):
    """What the rank loop needs of a channel to the runner."""

    def receive(self) -> tuple[bytes, list[Any]]:
        """Block for the next message and its buffers; raise EOFError when the runner is gone."""

    def send(self, message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send one message and its buffers; safe from any thread; blocks while the runner is behind."""

    def close(self) -> None:
        """Close the channel."""


class LocalLink:
    """A connected stream socket inherited from the runner."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._reader = framing.FrameReader()
        self._frames: deque[tuple[bytes, bytes]] = deque()
        self._descriptors: list[int] = []
        self._segments = SegmentReader()
        self._pool = SegmentPool()
        self._lock = threading.Lock()
        self._chunk = bytearray(_CHUNK)

    def receive(self) -> tuple[bytes, list[Any]]:
        """See :class:`Link`."""
        while not self._frames:
            try:
                size, ancillary, _, _ = self._socket.recvmsg_into([self._chunk], descriptors.ANCILLARY)
            except ConnectionResetError:  # the runner closed it with something unread
                size, ancillary = 0, []
            if ancillary:
                self._descriptors += descriptors.received(ancillary)
            if not size:
                raise EOFError("the runner closed the channel")
            self._frames.extend(self._reader.feed(memoryview(self._chunk)[:size]))
        header, message = self._frames.popleft()
        if not header:
            return message, []
        placement = framing.decode_placement(header)
        buffers = self._segments.read(placement, self._descriptors)
        return framing.whole(placement, message, buffers), buffers

    def send(self, message: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """See :class:`Link`."""
        with self._lock:
            header: bytes = b""
            fds: list[int] = []
            if buffers or len(message) > framing.INLINE_MESSAGE:
                inline = len(message) <= framing.INLINE_MESSAGE
                placement, fds = self._pool.place(buffers if inline else [message, *buffers])
                if not inline:
                    placement = framing.Placement(placement.places, placement.new, placement.dropped, True)
                    message = b""
                header = framing.encode_placement(placement)
            frame = framing.PREFIX.pack(len(header) + len(message), len(header)) + header + message
            try:
                self._send_all(frame, fds)
            finally:
                for descriptor in fds:
                    os.close(descriptor)

    def _send_all(self, frame: bytes, fds: list[int]) -> None:
        piece = framing.PIECE
        if fds:
            sent = socket.send_fds(self._socket, [frame[:piece]], fds)
            frame = frame[sent:]
        while frame:
            sent = self._socket.send(frame[:piece])
            frame = frame[sent:]

    def close(self) -> None:
        """See :class:`Link`."""
        self._socket.close()
        self._segments.close()
        self._pool.close()
