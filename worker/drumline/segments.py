"""Shared-memory segments: large buffers are copied once by the sender and read in place by the receiver.

A segment is an anonymous file: one header page, then data. The header has one word per receiver, which says whether that
receiver still reads the data: the sender sets it before it sends, the receiver clears it when the last Python object on
top of the data is gone. So a pool needs no message to get a segment back, and pages stay warm: fresh ones would cost 26
times the copy. A receiver whose process was forked meanwhile has a child that may read on, of which nobody hears: it
writes that the segment is given up, and the sender never writes to it again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from typing_extensions import Buffer

from drumline.framing import NewSegment, Place, Placement
from drumline.page import create_file

HEADER = max(4096, mmap.PAGESIZE)
_ALIGN = 64
#: Free memory that a pool keeps for the next results, or payloads.
KEPT_FREE_BYTES = 512 << 20
#: Segments of a payload pool, with one descriptor each. One request runs at a time: more than a few are in use only when
#: a worker keeps its inputs, and then they need not come back.
MOST_PAYLOADS = 8

_FREE, _LEASED, _GIVEN_UP = range(3)

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
    mapped = _reserve(descriptor, size)
    _map_over(mapped, 0, size, descriptor, flags)
    return mapped


def _map_private(descriptor: int, size: int) -> mmap.mmap:
    """Map a file so that writes to its data stay in this process, while its header is shared with the sender."""
    if size <= HEADER:
        raise ValueError(f"a segment of {size} bytes is not what was sent")
    mapped = _reserve(descriptor, size)
    _map_over(mapped, 0, HEADER, descriptor, mmap.MAP_SHARED)
    _map_over(mapped, HEADER, size - HEADER, descriptor, mmap.MAP_PRIVATE)
    return mapped


def _reserve(descriptor: int, size: int) -> mmap.mmap:
    if not 0 < size <= os.fstat(descriptor).st_size:
        raise ValueError(f"a segment of {size} bytes is not what was sent")
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _map_over(mapped: mmap.mmap, offset: int, size: int, descriptor: int, flags: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + offset
    found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags | _FIXED, descriptor, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{size} bytes cannot be mapped: {os.strerror(number)}")


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


def _offsets(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Return where each buffer begins, and where the last one ends."""
    offsets, at = [], HEADER
    for buffer in buffers:
        offsets.append(at)
        at += -(-_flat(buffer).nbytes // _ALIGN) * _ALIGN
    return offsets, at


def _places(id: int, offsets: list[int], buffers: Sequence[Buffer]) -> list[Place]:
    return [Place(id, offset, _flat(b).nbytes) for offset, b in zip(offsets, buffers, strict=True)]


class _Segment:
    def __init__(self, id: int, descriptor: int, size: int, flags: int) -> None:
        self.id = id
        self.size = size
        self.view = memoryview(_map(descriptor, size, flags))
        self._words = self.view[:HEADER].cast("Q")
        self._readers = 1

    @property
    def capacity(self) -> int:
        return self.size - HEADER

    @property
    def leased(self) -> bool:
        return any(self._words[: self._readers])

    @property
    def given_up(self) -> bool:
        return _GIVEN_UP in self._words[: self._readers].tolist()

    def lease(self, readers: int = 1) -> None:
        self._readers = readers
        for reader in range(readers):
            self._words[reader] = _LEASED


_AnySegment = TypeVar("_AnySegment", bound=_Segment)


class _Pool(Generic[_AnySegment]):
    """The sender's segments. Not thread-safe: the channel's send lock guards it, or its one thread."""

    def __init__(self) -> None:
        self._segments: list[_AnySegment] = []
        self._next_id = 1

    def _free(self, size: int) -> _AnySegment | None:
        """Return the smallest free segment that has room for ``size`` bytes."""
        free = [s for s in self._segments if s.capacity >= size and not s.leased]
        return min(free, key=lambda s: s.capacity, default=None)

    def _add(self, name: str, size: int, make: Callable[[int, int, int], _AnySegment]) -> tuple[_AnySegment, int]:
        total = HEADER + _capacity(size)
        descriptor = create_file(name, total)
        try:
            segment = make(self._next_id, descriptor, total)
        except BaseException:
            os.close(descriptor)
            raise
        self._next_id += 1
        self._segments.append(segment)
        return segment, descriptor

    def _drop_surplus(self, keep: _AnySegment) -> list[int]:
        """Drop what is given up, and of what is free the smallest until no more is left than may be kept."""
        dropped = [s for s in self._segments if s.given_up]
        free = [s for s in self._segments if s is not keep and not s.leased]
        kept = sum(s.size for s in free)
        for segment in sorted(free, key=lambda s: s.size):
            if kept <= KEPT_FREE_BYTES:
                break
            kept -= segment.size
            dropped.append(segment)
        for segment in dropped:
            self._segments.remove(segment)
        return [segment.id for segment in dropped]

    def close(self) -> None:
        """Unmap everything; data that the receiver still reads stays valid there."""
        self._segments.clear()


class SegmentPool(_Pool[_Segment]):
    """Segments for one receiver, which knows them by number and shares their memory: a rank's results."""

    def place(self, buffers: Sequence[Buffer]) -> tuple[Placement, list[int]]:
        """Copy ``buffers`` into one segment; return where they lie and the descriptors that must travel along.

        The descriptors are the caller's, to be closed when they were sent.
        """
        offsets, end = _offsets(buffers)
        segment, descriptor = self._free(end - HEADER), -1
        if segment is None:
            segment, descriptor = self._add("results", end - HEADER, _shared)
        for offset, buffer in zip(offsets, buffers, strict=True):
            flat = _flat(buffer)
            segment.view[offset : offset + len(flat)] = flat
        segment.lease()
        places = _places(segment.id, offsets, buffers)
        if descriptor < 0:
            return Placement(places), []
        return Placement(places, [NewSegment(segment.id, segment.size)], self._drop_surplus(segment)), [descriptor]


def _shared(id: int, descriptor: int, size: int) -> _Segment:
    return _Segment(id, descriptor, size, mmap.MAP_SHARED | _POPULATE)


class _PayloadSegment(_Segment):
    """Keeps its descriptor, which goes along with every frame: a receiver that may write maps the data anew each time."""

    def __init__(self, id: int, descriptor: int, size: int) -> None:
        super().__init__(id, descriptor, size, mmap.MAP_SHARED)
        self._written = HEADER
        # Last, so that whoever called closes it until here. It must be open for as long as any frame waits to be sent.
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    def write(self, offset: int, data: memoryview) -> None:
        # The first time through the descriptor: no page is zeroed before it is written, and where there is no memory
        # left, that is an error, while the mapping's is a SIGBUS. Pages that are there take a quarter of that.
        there = max(0, min(self._written - offset, len(data)))
        self.view[offset : offset + there] = data[:there]
        offset, data = offset + there, data[there:]
        while data:
            written = os.pwrite(self.descriptor, data, offset)
            data, offset = data[written:], offset + written
            self._written = max(self._written, offset)


class PayloadPool(_Pool[_PayloadSegment]):
    """Segments for several receivers, of which each reads the data in place and may write to its own copy: payloads."""

    def place(self, buffers: Sequence[Buffer], readers: int) -> tuple[list[Placement], int]:
        """Copy ``buffers`` into one segment; return, for each reader, where they lie, and the segment's descriptor.

        The descriptor stays the pool's; it is open until the next call at least.

        Raises:
            OSError: there is no memory, or no descriptor, for it.
            ValueError: there are more readers than a header has words.
        """
        if readers > HEADER // 8:
            raise ValueError(f"a segment has words for {HEADER // 8} readers, not for {readers}")
        offsets, end = _offsets(buffers)
        segment = self._free(end - HEADER)
        if segment is None:
            segment, _ = self._add("payload", end - HEADER, _PayloadSegment)
        try:
            at = HEADER
            for offset, buffer in zip(offsets, buffers, strict=True):
                segment.write(at, memoryview(bytes(offset - at)))
                flat = _flat(buffer)
                segment.write(offset, flat)
                at = offset + len(flat)
            # Nothing of an earlier payload may be left in any page that a reader maps.
            size = -(-max(at, HEADER + 1) // HEADER) * HEADER
            segment.write(at, memoryview(bytes(size - at)))
        except BaseException:
            self._segments.remove(segment)
            raise
        segment.lease(readers)
        self._drop_surplus(segment)
        del self._segments[:-MOST_PAYLOADS]
        places = _places(segment.id, offsets, buffers)
        return [Placement(places, [NewSegment(segment.id, size, True, word)]) for word in range(readers)], (
            segment.descriptor
        )


class _Claim:
    """Keeps a segment leased while any of the frame's buffers lives."""

    #: How often this process was about to fork, or had just forked.
    forks = 0

    def __init__(self, mapped: mmap.mmap, word: int) -> None:
        self._mapped = mapped
        self._at = 8 * word
        self._forks = _Claim.forks

    def __del__(self) -> None:
        state = _FREE if self._forks == _Claim.forks else _GIVEN_UP
        self._mapped[self._at : self._at + 8] = state.to_bytes(8, sys.byteorder)


def _forked() -> None:
    _Claim.forks += 1


# Twice: another thread may receive something between the first and the fork.
os.register_at_fork(before=_forked, after_in_parent=_forked)


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
        private: dict[int, tuple[mmap.mmap, int]] = {}
        for new in placement.new:
            if not descriptors:
                raise ValueError("a frame announces a segment without its descriptor")
            descriptor = descriptors.pop(0)
            try:
                if new.private:
                    if not 0 <= new.word < HEADER // 8:
                        raise ValueError(f"a segment's header has no word {new.word}")
                    private[new.id] = _map_private(descriptor, new.size), new.word
                else:
                    self._maps[new.id] = _map(descriptor, new.size, mmap.MAP_SHARED | _POPULATE)
            finally:
                os.close(descriptor)
        for id in placement.dropped:
            self._maps.pop(id, None)
        buffers: list[Any] = []
        claims: dict[int, _Claim] = {}
        for place in placement.places:
            mapped, word = private.get(place.segment) or (self._maps.get(place.segment), 0)
            if mapped is None or min(place.offset, place.length) < 0 or place.offset + place.length > len(mapped):
                raise ValueError(f"segment {place.segment} is not known or too small")
            lease = _lease_type(place.length).from_buffer(mapped, place.offset)
            if place.segment not in claims:
                claims[place.segment] = _Claim(mapped, word)
            lease.claim = claims[place.segment]  # type: ignore[attr-defined]
            buffers.append(lease)
        return buffers

    def close(self) -> None:
        """Forget all mappings; those with living buffers are unmapped when the buffers go."""
        self._maps.clear()
