"""Many updates at once: few system calls and few writes, nothing late, nothing lost, order kept."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from drumline import codec, framing
from drumline.codec import Packed
from drumline.runner.channel.local import LocalChannel
from drumline.runner.ticket import Ticket


def ticket() -> Ticket:
    return Ticket(1, "r", "c", Packed(b"\x80", []), streaming=True, images="jpeg", deadline=0.0, headers={},
                  buffer_limit=1 << 30, cancel=lambda number, error: None)  # fmt: skip


def updates(*values: object) -> list[Packed]:
    return [Packed(*codec.pack({"v": value})) for value in values]


async def texts(made: Ticket, joined: int) -> list[bytes]:
    made.value = updates("end")[0]
    made.finish(None)
    return [text async for text in made.text_events(joined=joined)]


@pytest.mark.parametrize(
    ("joined", "events"),
    [(0, [1, 1, 1, 1, 1, 1]), (1 << 20, [5, 1]), (100, [3, 2, 1])],
)
async def test_waiting_updates_are_joined_up_to_a_size(joined: int, events: list[int]) -> None:
    made = ticket()
    for update in updates(*"abcde"):
        made.push(update)
    parts = await texts(made, joined)
    assert [part.count(b"event: ") for part in parts] == events
    text = b"".join(parts)
    assert [text.index(b"id: %d\ndata: " % i) for i in range(6)] == sorted(
        text.index(b"id: %d\n" % i) for i in range(6)
    )
    assert [text.index(b'"%c"' % letter) for letter in b"abcde"] == sorted(text.index(b'"%c"' % c) for c in b"abcde")
    assert made._buffered == 0


async def test_an_update_does_not_wait_for_a_large_one_behind_it() -> None:
    made = ticket()
    for update in updates("small", "x" * (2 << 20), "last"):
        made.push(update)
    parts = await texts(made, 64 << 20)
    assert [(part.count(b"event: "), len(part) > 1 << 20) for part in parts] == [(1, False), (2, True), (1, False)]


async def test_what_comes_before_an_update_that_cannot_be_sent_is_sent() -> None:
    made = ticket()
    for update in updates("a", "b", float("nan"), "never"):
        made.push(update)
    parts = await texts(made, 1 << 20)
    assert [part.split(b"\n")[0] for part in parts] == [b"event: update", b"event: error"]
    assert parts[0].count(b"event: update") == 2
    assert parts[1].startswith(b"event: error\nid: 2\n")
    assert b"never" not in b"".join(parts)


async def test_a_burst_is_read_in_few_turns_and_one_answer_with_one_look() -> None:
    """Counted in turns of the event loop; another rank's message is not held up by more than one of them."""
    channel = LocalChannel(2)
    seen: list[tuple[int, bytes]] = []
    done = asyncio.Event()

    def on_message(rank: int, message: bytes, buffers: list[object]) -> None:
        seen.append((rank, message))
        if len(seen) == 101:
            done.set()

    ends = [socket.socket(fileno=os.dup(channel.rank_end(rank).descriptor)) for rank in range(2)]
    try:
        channel.open(on_message, lambda rank: None)
        for i in range(100):
            ends[0].send(framing.PREFIX.pack(3, 0) + b"%03d" % i)
        ends[1].send(framing.PREFIX.pack(5, 0) + b"other")
        turns = 0
        while not done.is_set():
            await asyncio.sleep(0)
            turns += 1
            assert turns < 50
        assert turns < 10
        assert [message for rank, message in seen if rank == 0] == [b"%03d" % i for i in range(100)]
        assert [rank for rank, _ in seen].index(1) <= 1
    finally:
        channel.close()
        for end in ends:
            end.close()
