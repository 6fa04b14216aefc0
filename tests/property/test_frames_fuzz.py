"""Anything at the rank's end of a channel: the runner's end delivers, or gives that rank up; nothing else comes out of it."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import msgspec
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from drumline import framing, multipart, protocol
from drumline.framing import PREFIX, NewSegment, Place, Placement
from drumline.page import create_file
from drumline.runner.channel.local import LocalChannel

SAMPLES: list[protocol.RankMessage] = [
    protocol.Ready(1.0, "cpu", "gloo"),
    protocol.SetupRaised(protocol.Failure("E", "é", "t")),
    protocol.Update(1, b"\x80"),
    protocol.Returned(1, 2, b"\x80"),
    protocol.Raised(1, 2, protocol.Failure("E", "m", "", b'[{"loc": ["a"]}]', "invalid")),
    protocol.Stopped(1, 2, 3),
    protocol.TornDown(),
]
MESSAGES = [protocol.encode(message) for message in SAMPLES]
INTEGERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 1, -1, 2**32, 2**63 - 1, 2**64 - 1])
BYTES = st.binary(max_size=12) | st.sampled_from(
    [b"\xff", b"\xc1", b"\x91" * 3000, b"\xdd\xff\xff\xff\xff", b"\xa1\xff"]
)


@st.composite
def broken(draw: st.DrawFn, parts: list[bytes]) -> bytes:
    """Some of ``parts`` in any order, some of them twice, with bytes that are overwritten, missing or between them."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(parts) | BYTES, min_size=1, max_size=6))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 9))] = draw(BYTES)
    return bytes(data)


@given(data=broken(MESSAGES))
@examples(300)
def test_broken_messages_are_messages_or_value_errors(data: bytes) -> None:
    try:
        found = protocol.decode_rank_message(data)
    except (ValueError, RecursionError):
        return
    assert isinstance(found, protocol.RankMessage)
    if isinstance(found, protocol.Raised) and found.failure.kind == "invalid":
        assert isinstance(msgspec.json.decode(found.failure.detail), list)


@pytest.mark.parametrize("detail", [b"", b"{", b"\xff", b"{}", b"[1]", b"null"])
def test_details_that_are_none_are_no_message(detail: bytes) -> None:
    data = msgspec.msgpack.encode([15, 1, 2, ["E", "m", "", detail, "invalid"]])
    with pytest.raises(ValueError, match=r"JSON|Expected|Input"):
        protocol.decode_rank_message(data)


@given(
    lengths=st.lists(INTEGERS, max_size=5) | st.just([]),
    head=BYTES,
    own=st.booleans(),
    pieces=st.lists(st.binary(max_size=40), max_size=6),
)
@examples(200)
def test_broken_multipart_messages_are_value_errors(
    lengths: list[int], head: bytes, own: bool, pieces: list[bytes]
) -> None:
    first = head if own else msgspec.msgpack.encode(lengths)
    frames = [memoryview(bytearray(frame)) for frame in (first, *pieces)]
    try:
        message, buffers = multipart.join(frames)
    except ValueError:
        return
    assert len(frames) == 1 or [len(message), *map(len, buffers)] == msgspec.msgpack.decode(first)


PLACES = st.builds(
    Place, INTEGERS | st.integers(0, 3), INTEGERS | st.integers(0, 9000), INTEGERS | st.integers(0, 9000)
)
SEGMENTS = st.builds(NewSegment, st.integers(0, 3), INTEGERS | st.sampled_from([4096, 8192, 8193]), st.booleans())
PLACEMENTS = st.builds(
    Placement,
    st.lists(PLACES, max_size=3),
    st.lists(SEGMENTS, max_size=2),
    st.lists(INTEGERS, max_size=2),
    st.booleans(),
)


@st.composite
def frame(draw: st.DrawFn) -> bytes:
    header = draw(st.just(b"") | PLACEMENTS.map(framing.encode_placement) | BYTES)
    message = draw(st.sampled_from(MESSAGES) | BYTES)
    total, of_header = len(header) + len(message), len(header)
    if draw(st.integers(0, 9)) == 0:
        total, of_header = draw(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
    return PREFIX.pack(total, of_header) + header + message


@given(sent=st.lists(st.tuples(frame() | BYTES, st.integers(0, 3)), max_size=6))
@examples(200)
def test_broken_frames_end_their_rank_and_nothing_else(sent: list[tuple[bytes, int]]) -> None:
    before = sorted(os.listdir("/dev/fd"))
    asyncio.run(_speak(sent))
    assert sorted(os.listdir("/dev/fd")) == before


async def _speak(sent: list[tuple[bytes, int]]) -> None:
    """Send all of it, with so many descriptors each, as rank 1; rank 0 goes on."""
    loop, wrong = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: wrong.append(context))
    channel, closed, over = LocalChannel(2), list[int](), asyncio.Event()
    from_rank_0: list[bytes] = []

    def on_closed(rank: int) -> None:
        assert rank not in closed
        closed.append(rank)
        over.set()

    def on_message(rank: int, message: bytes, buffers: list[Any]) -> None:
        assert rank not in closed
        assert all(len(bytes(buffer)) == len(memoryview(buffer)) for buffer in buffers)
        if rank == 0:
            from_rank_0.append(message)
            over.set()

    channel.open(on_message, on_closed)
    ends = [socket.socket(fileno=os.dup(channel.rank_end(rank).descriptor or 0)) for rank in (0, 1)]
    for rank in (0, 1):
        channel.release_rank_end(rank)
    for data, count in sent:
        files = [create_file("fuzz", 8192) for _ in range(count)]
        try:
            socket.send_fds(ends[1], [data or b"\0"], files)
        except OSError:
            break  # given up already
        finally:
            for file in files:
                os.close(file)
    ends[1].close()
    async with asyncio.timeout(20):
        await over.wait()
        over.clear()
        ends[0].send(PREFIX.pack(1, 0) + b"x")
        await over.wait()
    assert (closed, from_rank_0, wrong) == ([1], [b"x"], [])
    channel.close()
    ends[0].close()


def test_a_large_frame_in_small_pieces_costs_its_size_once() -> None:
    """Each piece is copied in once; the whole is looked at when it can be complete."""
    reader, size = framing.FrameReader(), 32 << 20
    data = memoryview(PREFIX.pack(size, 0) + bytes(size))
    looked = 0

    class Counted(bytearray):
        def __bytes__(self) -> bytes:
            nonlocal looked
            looked += 1
            return super().__getitem__(slice(None)).decode("latin-1").encode("latin-1")

    reader._pending = Counted()
    found = [each for at in range(0, len(data), 8192) for each in reader.feed(data[at : at + 8192])]
    assert [len(message) for _, message in found] == [size]
    assert looked <= 2
