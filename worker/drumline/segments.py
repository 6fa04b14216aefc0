"""Shared-memory segments: large buffers are copied once by the sender and read in place by the receiver.

A segment is an anonymous file: one header page, then data. The header's first word says whether the receiver still reads
the data: the sender sets it before it sends, the receiver clears it when the last Python object on top of the data is
gone. So a pool needs no message to get a segment back, and pages stay warm: a fresh mapping would cost 26 times the copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

from drumline.framing import NewSegment, Place, Placement
from drumline.page import create_file

HEADER = 4096
_ALIGN = 64
#: Free memory that a pool keeps for the next results.
KEPT_FREE_BYTES = 512 << 20

_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_FAILED = ctypes.c_void_p(-1).value
_FIXED = 0x10  # MAP_FIXED, which Python's mmap does not name; the same on Linux and macOS


def _map(descriptor: int, size: int, flags: int) -> mmap.mmap:
    """Map a file without keeping a descriptor of it open.

    Python's own mapping of a file keeps one (before 3.13): a caller that holds a thousand results would run out of them.
    So Python maps memory without a file, and owns that range, and the file is mapped in its place.
    """
    if not 0 < size <= os.fstat(descriptor).st_size:
        raise ValueError(f"a segment of {size} bytes is not what was sent")
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags | _FIXED, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{size} bytes cannot be mapped: {os.strerror(number)}")
    return mapped


def _capacity(size: int) -> int:
    """Round up so that slightly different results fit the same segment: powers of two, then steps of 64 MiB."""
    step = 64 << 20
    if size >= step:
        return -(-size // step) * step
    capacity = 256 << 10
    while capacity < size:
        capacity *= 2
    return capacity


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")  # a shape with a zero in it cannot be cast


class _Segment:
    def __init__(self, id: int, descriptor: int, size: int) -> None:
        self.id = id
        self.size = size
        self.view = memoryview(_map(descriptor, size, mmap.MAP_SHARED | _POPULATE))
        self._word = self.view[:8].cast("Q")

    @property
    def capacity(self) -> int:
        return self.size - HEADER

    @property
    def leased(self) -> bool:
        return bool(self._word[0])

    def lease(self) -> None:
        self._word[0] = 1


class SegmentPool:
    """The sender's segments. Not thread-safe: the channel's send lock guards it."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._next_id = 1

    def place(self, buffers: Sequence[Buffer]) -> tuple[Placement, list[int]]:
        """Copy ``buffers`` into one segment; return where they lie and the descriptors that must travel along.

        The descriptors are the caller's, to be closed when they were sent.
        """
        offsets, at = [], HEADER
        for buffer in buffers:
            offsets.append(at)
            at += -(-_flat(buffer).nbytes // _ALIGN) * _ALIGN
        segment, descriptors = self._take(at - HEADER)
        for offset, buffer in zip(offsets, buffers, strict=True):
            flat = _flat(buffer)
            segment.view[offset : offset + len(flat)] = flat
        segment.lease()
        places = [Place(segment.id, offset, _flat(b).nbytes) for offset, b in zip(offsets, buffers, strict=True)]
        if not descriptors:
            return Placement(places), []
        return Placement(places, [NewSegment(segment.id, segment.size)], self._drop_surplus(segment)), descriptors

    def _take(self, size: int) -> tuple[_Segment, list[int]]:
        free = [s for s in self._segments if s.capacity >= size and not s.leased]
        if free:
            return min(free, key=lambda s: s.capacity), []
        total = HEADER + _capacity(size)
        descriptor = create_file("results", total)
        try:
            segment = _Segment(self._next_id, descriptor, total)
        except BaseException:
            os.close(descriptor)
            raise
        self._next_id += 1
        self._segments.append(segment)
        return segment, [descriptor]

    def _drop_surplus(self, keep: _Segment) -> list[int]:
        dropped = []
        free = [s for s in self._segments if s is not keep and not s.leased]
        kept = sum(s.size for s in free)
        for segment in sorted(free, key=lambda s: s.size):
            if kept <= KEPT_FREE_BYTES:
                break
            kept -= segment.size
            self._segments.remove(segment)
            dropped.append(segment.id)
        return dropped

    def close(self) -> None:
        """Unmap everything; data that the receiver still reads stays valid there."""
        self._segments.clear()


def place_transient(buffers: Sequence[Buffer]) -> tuple[Placement, int]:
    """Copy ``buffers`` into a new file that is written once; return where they lie and its descriptor (the caller's)."""
    offsets, at = [], 0
    for buffer in buffers:
        offsets.append(at)
        at += -(-_flat(buffer).nbytes // _ALIGN) * _ALIGN
    size = max(at, 1)
    descriptor = create_file("payload", size)
    try:
        for offset, buffer in zip(offsets, buffers, strict=True):
            _write(descriptor, _flat(buffer), offset)
    except BaseException:
        os.close(descriptor)
        raise
    places = [Place(0, offset, _flat(b).nbytes) for offset, b in zip(offsets, buffers, strict=True)]
    return Placement(places, [NewSegment(0, size, transient=True)]), descriptor


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    # Half of what a copy into a fresh mapping costs: no page fault per page, and no page is zeroed before it is written.
    # And where there is no memory left, this is an error, while the mapping's is a SIGBUS.
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class _Claim:
    """Keeps a segment leased while any of the frame's buffers lives."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped

    def __del__(self) -> None:
        self._mapped[:8] = b"\0" * 8


_lease_types: dict[int, type[ctypes.Array[ctypes.c_char]]] = {}


def _lease_type(length: int) -> type[ctypes.Array[ctypes.c_char]]:
    # A subclass written in Python, because only that may carry attributes (the claim).
    if length not in _lease_types:
        if len(_lease_types) > 256:
            _lease_types.clear()
        _lease_types[length] = type("Lease", (ctypes.c_char * length,), {})
    return _lease_types[length]


class SegmentReader:
    """The receiver's mappings of one sender's segments."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, placement: Placement, descriptors: list[int]) -> list[Any]:
        """Return one writable buffer object per place, without a copy; takes over (and closes) ``descriptors``.

        The data stays valid while the objects live; afterwards the sender may reuse the memory.

        Raises:
            ValueError: the frame names a segment or range that does not exist.
            OSError: there is no room for another mapping.
        """
        transient: dict[int, mmap.mmap] = {}
        for new in placement.new:
            if not descriptors:
                raise ValueError("a frame announces a segment without its descriptor")
            descriptor = descriptors.pop(0)
            try:
                if new.transient:
                    transient[new.id] = _map(descriptor, new.size, mmap.MAP_PRIVATE)
                else:
                    self._maps[new.id] = _map(descriptor, new.size, mmap.MAP_SHARED | _POPULATE)
            finally:
                os.close(descriptor)
        for id in placement.dropped:
            self._maps.pop(id, None)
        buffers: list[Any] = []
        claims: dict[int, _Claim] = {}
        for place in placement.places:
            mapped = transient.get(place.segment) or self._maps.get(place.segment)
            if mapped is None or min(place.offset, place.length) < 0 or place.offset + place.length > len(mapped):
                raise ValueError(f"segment {place.segment} is not known or too small")
            lease = _lease_type(place.length).from_buffer(mapped, place.offset)
            if place.segment not in transient:
                if place.segment not in claims:
                    claims[place.segment] = _Claim(mapped)
                lease.claim = claims[place.segment]  # type: ignore[attr-defined]
            buffers.append(lease)
        return buffers

    def close(self) -> None:
        """Forget all mappings; those with living buffers are unmapped when the buffers go."""
        self._maps.clear()
