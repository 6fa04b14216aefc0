"""Messages with buffers survive being cut into frames; frames that do not fit are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drumline import multipart

PIECE = 64


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(multipart, "PIECE", PIECE)
    yield
    patch.undo()


# Sizes at and around the edges of a piece.
sizes = st.one_of(
    st.integers(0, 5),
    st.tuples(st.integers(0, 6), st.integers(-1, 1)).map(lambda drawn: max(drawn[0] * PIECE + drawn[1], 0)),
)
parts = sizes.flatmap(lambda size: st.binary(min_size=size, max_size=size))


def on_the_wire(frames: list[Any]) -> list[memoryview]:
    """As they arrive: each frame in memory of its own that may be written."""
    return [memoryview(bytearray(frame)) for frame in frames]


@given(message=parts, buffers=st.lists(parts, max_size=5))
@settings(suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_what_is_cut_can_be_joined(message: bytes, buffers: list[bytes]) -> None:
    frames = multipart.cut(message, buffers)
    assert all(len(frame) <= PIECE for frame in frames[1:])
    assert len(frames) > 1 or not buffers
    received, parts = multipart.join(on_the_wire(frames))
    assert received == message
    assert [bytes(part) for part in parts] == buffers
    assert not any(memoryview(part).readonly for part in parts)


@given(
    message=parts,
    buffers=st.lists(parts, min_size=1, max_size=3),
    damage=st.sampled_from(["drop", "twice", "shorter", "longer", "header"]),
    at=st.integers(0, 100),
)
def test_frames_that_do_not_fit_are_refused(message: bytes, buffers: list[bytes], damage: str, at: int) -> None:
    frames = [bytes(frame) for frame in multipart.cut(message, buffers)]
    at = 1 + at % (len(frames) - 1)
    match damage:
        case "drop":
            del frames[at]
            if len(frames) == 1:
                return  # that is a message now
        case "twice":
            frames.insert(at, frames[at])
        case "shorter":
            if not frames[at]:
                return
            frames[at] = frames[at][:-1]
        case "longer":
            frames[at] += b"x"
        case "header":
            frames[0] = b"\xc1" + frames[0]
    with pytest.raises(ValueError, match=r"."):
        multipart.join(on_the_wire(frames))


@pytest.mark.parametrize("lengths", [[], [1 << 62, 1], [-5, 1], [3, 1 << 40]])
def test_lengths_alone_make_nobody_allocate(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        multipart.join(on_the_wire([multipart._encode(lengths), b"abc", b"d"]))


def test_large_parts_are_not_copied_when_they_are_cut() -> None:
    body = bytearray(10 * PIECE)
    frames = multipart.cut(b"m", [body])
    body[:] = b"x" * len(body)
    assert all(bytes(frame) == b"x" * PIECE for frame in frames[2:])


def test_a_single_piece_is_not_copied_when_it_is_joined() -> None:
    frames = on_the_wire(multipart.cut(b"m", [b"a" * PIECE]))
    _, [buffer] = multipart.join(frames)
    frames[-1][0] = ord("b")
    assert bytes(buffer[:2]) == b"ba"
