"""One contract, two channels: what arrives, and how long its memory lives; over socket pairs and over ZeroMQ with CURVE."""

from __future__ import annotations

import asyncio
import itertools
import os
import zlib
from collections.abc import AsyncIterator

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from drumline.runner.channel.local import LocalChannel
from drumline.runner.channel.remote import RemoteChannel
from drumline.testing.channel_group import ChannelGroup, encode

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
SECONDS = 40  # of a test, on a busy machine
RANKS = 3
marks = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["local", "remote"])
async def ranks(request: pytest.FixtureRequest) -> AsyncIterator[ChannelGroup]:
    """A group of three that these tests share: none of them ends a rank."""
    made = ChannelGroup(LocalChannel(RANKS) if request.param == "local" else RemoteChannel(RANKS), RANKS)
    try:
        async with asyncio.timeout(SECONDS):
            for rank in range(RANKS):
                await made.ask(rank, "echo")
        yield made
    finally:
        await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def group(ranks: ChannelGroup) -> AsyncIterator[ChannelGroup]:
    """The group without anything of the test before, which may have failed half way."""
    async with asyncio.timeout(SECONDS):
        mark = next(marks)
        for rank in range(RANKS):
            ranks.tell(rank, "drop")
            ranks.tell(rank, "echo", mark=mark)
            while (await ranks.take(rank))[0][0] != {"do": "echo", "mark": mark}:
                continue
    yield ranks
    assert ranks.closed == []


def pattern(size: int, seed: int = 0) -> bytes:
    """``size`` bytes in which no piece looks like another."""
    return np.random.default_rng(seed).bytes(size)


# -- what arrives


async def test_messages_arrive_in_order_at_every_rank(group: ChannelGroup) -> None:
    for number in range(300):
        buffers = [pattern(100_000, number)] if number % 7 == 0 else []
        group.channel.send(range(3), encode({"do": "echo", "number": number}), buffers)
    for rank in range(3):
        answers = await group.take(rank, 300)
        assert [message["number"] for message, _ in answers] == list(range(300))
        for number, (_, buffers) in enumerate(answers):
            assert [bytes(b) for b in buffers] == ([pattern(100_000, number)] if number % 7 == 0 else [])
    assert group.closed == []


@pytest.mark.parametrize("size", [1, 1000, 64 << 10, (64 << 10) + 1, 4 * MIB, 4 * MIB + 1, 9 * MIB])
async def test_messages_of_any_size(group: ChannelGroup, size: int) -> None:
    body = pattern(size)
    answer, buffers = await group.ask(0, "echo", body=body)
    assert answer["body"] == body
    assert buffers == []


@pytest.mark.parametrize("sizes", [[1], [0], [4 * MIB], [4 * MIB + 1], [200 * MIB], [100_000, 0, 5 * MIB, 3, 70_000]])
async def test_buffers_of_any_size(group: ChannelGroup, sizes: list[int]) -> None:
    sent = [pattern(size, seed) for seed, size in enumerate(sizes)]
    _, received = await group.ask(0, "echo", sent)
    assert [memoryview(buffer).nbytes for buffer in received] == sizes
    assert all(memoryview(buffer).cast("B") == body for buffer, body in zip(received, sent, strict=True))


async def test_anything_with_the_buffer_protocol_is_a_buffer(group: ChannelGroup) -> None:
    array = np.arange(60_000, dtype=np.float64).reshape(3, 4, 5000)
    tensor = torch.arange(50_000)
    empty = np.zeros((0, 3))
    _, received = await group.ask(0, "echo", [array, memoryview(tensor.numpy()), bytearray(b"abc"), empty])
    assert np.array_equal(np.frombuffer(received[0]).reshape(array.shape), array)
    assert torch.equal(torch.frombuffer(received[1], dtype=torch.int64), tensor)
    assert [bytes(received[2]), memoryview(received[3]).nbytes] == [b"abc", 0]


async def test_buffers_may_be_written_at_both_ends(group: ChannelGroup) -> None:
    sent = [b"a" * 100_000, b"b" * 5 * MIB]
    group.channel.send([0, 1], encode({"do": "change"}), sent)
    for rank in (0, 1):
        [(_, received)] = await group.take(rank)
        for buffer, body in zip(received, sent, strict=True):
            assert bytes(buffer) == b"!" + body[1:]
            memoryview(buffer).cast("B")[:2] = b"??"
            assert bytes(buffer)[:3] == b"??" + body[2:3]
    assert sent == [b"a" * 100_000, b"b" * 5 * MIB]


async def test_what_a_rank_does_with_a_payload_is_not_seen_in_the_next(group: ChannelGroup) -> None:
    """Memory is used again, for shorter payloads too, while some ranks keep theirs."""
    kept: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}
    for number, size in enumerate([900_000, 300_000, 70_000, 800_000, 66_000, 900_000]):
        sent = [pattern(size, number), pattern(number + 1, number)]
        group.channel.send(range(RANKS), encode({"do": "change"}), sent)
        for rank in range(RANKS):
            [(_, received)] = await group.take(rank)
            assert [bytes(buffer) for buffer in received] == [b"!" + body[1:] for body in sent]
        keeper = number % RANKS
        group.tell(keeper, "keep", sent)
        kept[keeper] += [zlib.crc32(body) for body in sent]
    for rank in range(RANKS):
        sums, _ = await group.ask(rank, "check kept")
        assert sums == kept[rank]


async def test_the_sender_may_change_its_buffers_at_once(group: ChannelGroup) -> None:
    mine = bytearray(b"a" * 8 * MIB)
    group.tell(0, "check", [mine])
    mine[:] = b"b" * len(mine)
    [(sums, _)] = await group.take(0)
    assert sums == [zlib.crc32(b"a" * 8 * MIB)]


# -- how long memory lives


async def test_buffers_stay_valid_until_they_are_dropped(group: ChannelGroup) -> None:
    kept = []
    for round_number in range(6):
        group.tell(0, "make", count=8, size=300_000, buffer=True)
        for message, [buffer] in await group.take(0, 8):
            if message["number"] == round_number:
                kept.append(np.frombuffer(buffer, np.uint8))
    assert [set(array.tolist()) for array in kept] == [{number} for number in range(6)]


async def test_a_ranks_buffers_stay_valid_until_it_drops_them(group: ChannelGroup) -> None:
    bodies = [pattern(200_000, seed) for seed in range(8)]
    for body in bodies:
        group.tell(0, "keep", [body, body[:70_000]])
        await group.ask(0, "echo", [b"\xff" * 200_000])
    sums, _ = await group.ask(0, "check kept")
    assert sums == [zlib.crc32(part) for body in bodies for part in (body, body[:70_000])]


def resident(group: ChannelGroup) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), group.processes[0].pid))


async def test_memory_and_descriptors_are_used_again(group: ChannelGroup) -> None:
    body = pattern(8 * MIB)

    async def rounds(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            _, [buffer] = await group.ask(0, "echo", [body])
            assert memoryview(buffer).cast("B") == body
            del buffer
        return resident(group), len(os.listdir("/dev/fd")), (await group.ask(0, "descriptors"))[0]

    memory, mine, theirs = await rounds(8)
    memory_later, mine_later, theirs_later = await rounds(24)  # 384 MiB there and back
    assert memory_later - memory < 80 * MIB
    assert mine_later == mine
    assert theirs_later == theirs


async def test_buffers_that_are_kept_cost_no_descriptors(group: ChannelGroup) -> None:
    theirs, mine = (await group.ask(0, "descriptors"))[0], len(os.listdir("/dev/fd"))
    group.tell(0, "make", count=300, size=70_000, buffer=True)
    kept = await group.take(0, 300)
    for _, buffers in kept:
        group.tell(0, "keep", buffers)
    assert (await group.ask(0, "descriptors"))[0] == theirs
    assert len(os.listdir("/dev/fd")) == mine
    sums, _ = await group.ask(0, "check kept")
    assert sums == [zlib.crc32(bytes([number % 251]) * 70_000) for number in range(300)]


# -- threads of a rank


async def test_a_ranks_threads_may_send_while_it_receives(group: ChannelGroup) -> None:
    group.tell(0, "threads", threads=4, count=200)
    for number in range(200):
        group.tell(0, "echo", echo=number)
    answers = [message for message, _ in await group.take(0, 1000)]
    assert [m["echo"] for m in answers if "echo" in m] == list(range(200))
    for thread in range(4):
        assert [m["number"] for m in answers if m.get("thread") == thread] == list(range(200))


async def test_a_thread_may_send_while_its_rank_waits_for_a_message(group: ChannelGroup) -> None:
    # Nothing comes from the runner after the command, so the rank's main thread waits in `receive` all the time.
    group.tell(0, "threads", threads=2, count=300)
    assert len(await group.take(0, 600)) == 600
