"""Frames on a stream socket between runner and rank, with large buffers beside them in shared memory.

A frame is ``length u32 | header length u32 | header | message``. The header is empty for a message without buffers, else
msgpack of :class:`Placement`: where each buffer lies and which descriptors (sent with ``SCM_RIGHTS``) are new.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

PREFIX = struct.Struct("<II")
#: A message larger than this travels in shared memory as one more buffer; far below any socket buffer's default.
INLINE_MESSAGE = 64 << 10
#: A frame is sent in pieces of this size: one message of a ``SOCK_SEQPACKET`` socket must fit its buffer.
PIECE = 128 << 10
#: More would not be a message of ours: the peer is broken.
LARGEST_FRAME = 64 << 20


class NewSegment(msgspec.Struct, array_like=True, frozen=True):
    """A segment whose descriptor comes with this frame.

    ``private``: it is mapped for this frame only, and what the receiver writes stays its own. ``word``: the receiver's word
    in the header.
    """

    id: int
    size: int
    private: bool = False
    word: int = 0


class Place(msgspec.Struct, array_like=True, frozen=True):
    """One buffer: ``length`` bytes at ``offset`` of ``segment``."""

    segment: int
    offset: int
    length: int


class Placement(msgspec.Struct, array_like=True, frozen=True):
    """Where the buffers of a frame lie. ``message_in_segment``: the first place is the message itself."""

    places: list[Place]
    new: list[NewSegment] = []
    dropped: list[int] = []
    message_in_segment: bool = False


encode_placement = msgspec.msgpack.Encoder().encode
decode_placement = msgspec.msgpack.Decoder(Placement).decode


def whole(placement: Placement, message: bytes, buffers: list[Any]) -> bytes:
    """Return a frame's message: ``message``, or the first of ``buffers``, which is taken out.

    Raises:
        ValueError: it should be there and is not.
    """
    if not placement.message_in_segment:
        return message
    if not buffers:
        raise ValueError("a frame's message should lie in a segment, but the frame names no place")
    return bytes(buffers.pop(0))


class FrameReader:
    """Cut a byte stream into ``(header, message)`` pairs."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._wanted = 0  # bytes until the frame at the beginning of what is pending is complete

    def feed(self, chunk: memoryview) -> Iterator[tuple[bytes, bytes]]:
        """Yield every frame that ``chunk`` completes.

        Raises:
            ValueError: a frame is larger than a frame can be.
        """
        if self._pending:
            self._pending += chunk
            if len(self._pending) < self._wanted:
                return  # looked at again and again, a large frame in small pieces would cost its size squared
            data = memoryview(bytes(self._pending))
            self._pending.clear()
        else:
            data = chunk
        at, size, self._wanted = 0, len(data), 0
        while size - at >= PREFIX.size:
            length, header = PREFIX.unpack_from(data, at)
            if length > LARGEST_FRAME or header > length:
                raise ValueError(f"a frame of {length} bytes with a header of {header} is not ours")
            end = at + PREFIX.size + length
            if end > size:
                self._wanted = end - at
                break
            middle = at + PREFIX.size + header
            yield bytes(data[at + PREFIX.size : middle]), bytes(data[middle:end])
            at = end
        if at < size:
            self._pending += data[at:]
