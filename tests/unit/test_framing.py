"""Frames come out of the stream as they went in, however the kernel cuts it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline import framing
from drumline.framing import PREFIX, FrameReader, NewSegment, Place, Placement

frames = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=20)


def stream(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(PREFIX.pack(len(h) + len(m), len(h)) + h + m for h, m in pairs)


@given(pairs=frames, cuts=st.lists(st.integers(0, 8000), max_size=30))
def test_any_split_gives_the_same_frames(pairs: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    data = stream(pairs)
    bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    reader = FrameReader()
    found: list[tuple[bytes, bytes]] = []
    for start, end in itertools.pairwise(bounds):
        # The chunk's memory is used again by the next read, so nothing may refer to it.
        chunk = bytearray(data[start:end])
        found += list(reader.feed(memoryview(chunk)))
        chunk[:] = b"\xff" * len(chunk)
    assert found == pairs


def test_byte_by_byte() -> None:
    pairs = [(b"", b"a"), (b"head", b""), (b"", b""), (b"h", b"m" * 1000)]
    reader = FrameReader()
    found = [frame for byte in stream(pairs) for frame in reader.feed(memoryview(bytes([byte])))]
    assert found == pairs


def test_a_frame_is_there_as_soon_as_its_last_byte_is() -> None:
    data = stream([(b"h", b"message")])
    reader = FrameReader()
    assert list(reader.feed(memoryview(data[:-1]))) == []
    assert list(reader.feed(memoryview(data[-1:]))) == [(b"h", b"message")]


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX.pack(framing.LARGEST_FRAME + 1, 0),
        PREFIX.pack(10, 11),
        b"GET / HTTP/1.1\r\n",
        b"\xff" * 8,
    ],
)
def test_what_is_no_frame_is_refused(prefix: bytes) -> None:
    with pytest.raises(ValueError, match="is not ours"):
        list(FrameReader().feed(memoryview(prefix)))


def test_frames_before_a_broken_one_come_out() -> None:
    reader = FrameReader()
    feed = reader.feed(memoryview(stream([(b"", b"fine")]) + b"\xff" * 8))
    assert next(feed) == (b"", b"fine")
    with pytest.raises(ValueError, match="is not ours"):
        next(feed)


def test_placements_keep_their_fields() -> None:
    full = Placement(
        [Place(3, 4096, 70_000), Place(0, 0, 0)], [NewSegment(3, 1 << 20), NewSegment(0, 1, True)], [1, 2], True
    )
    for placement in (full, Placement([])):
        assert framing.decode_placement(framing.encode_placement(placement)) == placement


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\x91\x91\xa1x"])
def test_a_broken_placement_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        framing.decode_placement(data)
