"""One contract, two channels: the same tests over inherited socket pairs and over ZeroMQ with CURVE."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import numpy as np
import psutil
import pytest
import torch

from drumline.runner.channel.local import LocalChannel
from drumline.runner.channel.remote import RemoteChannel
from drumline.testing.channel_group import ChannelGroup, encode

MIB = 1 << 20
SECONDS = 40  # of a test, on a busy machine


Start = Callable[..., AbstractAsyncContextManager[ChannelGroup]]


@pytest.fixture(params=["local", "remote"])
def start(request: pytest.FixtureRequest) -> Start:
    @asynccontextmanager
    async def started(world_size: int = 1, *, connected: bool = True) -> AsyncIterator[ChannelGroup]:
        group = ChannelGroup(
            LocalChannel(world_size) if request.param == "local" else RemoteChannel(world_size), world_size
        )
        try:
            async with asyncio.timeout(SECONDS):
                for rank in range(world_size if connected else 0):
                    await group.ask(rank, "echo")
                yield group
        finally:
            await group.close()

    return started


def pattern(size: int, seed: int = 0) -> bytes:
    """``size`` bytes in which no piece looks like another."""
    return np.random.default_rng(seed).bytes(size)


# -- what arrives


async def test_messages_arrive_in_order_at_every_rank(start: Start) -> None:
    async with start(3) as group:
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
async def test_messages_of_any_size(start: Start, size: int) -> None:
    async with start() as group:
        body = pattern(size)
        answer, buffers = await group.ask(0, "echo", body=body)
        assert answer["body"] == body
        assert buffers == []


@pytest.mark.parametrize("sizes", [[1], [0], [4 * MIB], [4 * MIB + 1], [200 * MIB], [100_000, 0, 5 * MIB, 3, 70_000]])
async def test_buffers_of_any_size(start: Start, sizes: list[int]) -> None:
    async with start() as group:
        sent = [pattern(size, seed) for seed, size in enumerate(sizes)]
        _, received = await group.ask(0, "echo", sent)
        assert [memoryview(buffer).nbytes for buffer in received] == sizes
        assert all(memoryview(buffer).cast("B") == body for buffer, body in zip(received, sent, strict=True))


async def test_anything_with_the_buffer_protocol_is_a_buffer(start: Start) -> None:
    async with start() as group:
        array = np.arange(60_000, dtype=np.float64).reshape(3, 4, 5000)
        tensor = torch.arange(50_000)
        empty = np.zeros((0, 3))
        _, received = await group.ask(0, "echo", [array, memoryview(tensor.numpy()), bytearray(b"abc"), empty])
        assert np.array_equal(np.frombuffer(received[0]).reshape(array.shape), array)
        assert torch.equal(torch.frombuffer(received[1], dtype=torch.int64), tensor)
        assert [bytes(received[2]), memoryview(received[3]).nbytes] == [b"abc", 0]


async def test_buffers_may_be_written_at_both_ends(start: Start) -> None:
    async with start(2) as group:
        sent = [b"a" * 100_000, b"b" * 5 * MIB]
        group.channel.send([0, 1], encode({"do": "change"}), sent)
        for rank in (0, 1):
            [(_, received)] = await group.take(rank)
            for buffer, body in zip(received, sent, strict=True):
                assert bytes(buffer) == b"!" + body[1:]
                memoryview(buffer).cast("B")[:2] = b"??"
                assert bytes(buffer)[:3] == b"??" + body[2:3]
        assert sent == [b"a" * 100_000, b"b" * 5 * MIB]


async def test_the_sender_may_change_its_buffers_at_once(start: Start) -> None:
    async with start() as group:
        mine = bytearray(b"a" * 8 * MIB)
        group.tell(0, "check", [mine])
        mine[:] = b"b" * len(mine)
        [(sums, _)] = await group.take(0)
        assert sums == [zlib.crc32(b"a" * 8 * MIB)]


# -- who is slow


async def test_a_rank_that_does_not_read_delays_nobody_and_loses_nothing(start: Start) -> None:
    async with start(2) as group:
        group.tell(0, "pause")
        assert await group.line(0) == "paused"
        for number in range(5000):
            buffers = [pattern(70_000, number)] if number % 100 == 0 else []
            group.channel.send([0, 1], encode({"do": "echo", "number": number}), buffers)
        assert [m["number"] for m, _ in await group.take(1, 5000)] == list(range(5000))
        assert group.received[0] == []
        group.resume(0)
        answers = await group.take(0, 5000)
        assert [message["number"] for message, _ in answers] == list(range(5000))
        assert all(bytes(answers[n][1][0]) == pattern(70_000, n) for n in range(0, 5000, 100))


async def test_a_runner_that_does_not_read_makes_its_rank_wait(start: Start) -> None:
    count, size = 60_000, 400
    async with start() as group:
        group.tell(0, "make", count=count, size=size, buffer=False, report=100)
        await asyncio.sleep(0)  # the command leaves
        stdout = group.processes[0].stdout
        assert stdout is not None
        # From here on nothing runs this loop until the rank has stopped, because it must, or has sent everything.
        said = b""
        while select.select([stdout], [], [], 1.0)[0] and not said.endswith(b"done\n"):
            said += os.read(stdout.fileno(), 1 << 16)
        assert said.startswith(b"0\n")
        assert not said.endswith(b"done\n"), "all was sent, and lies in memory"
        answers = await group.take(0, count)
        assert [message["number"] for message, _ in answers] == list(range(count))
        assert all(message["body"] == bytes([n % 251]) * size for n, (message, _) in enumerate(answers))


# -- how long memory lives


async def test_buffers_stay_valid_until_they_are_dropped(start: Start) -> None:
    async with start() as group:
        kept = []
        for round_number in range(6):
            group.tell(0, "make", count=8, size=300_000, buffer=True)
            for message, [buffer] in await group.take(0, 8):
                if message["number"] == round_number:
                    kept.append(np.frombuffer(buffer, np.uint8))
        assert [set(array.tolist()) for array in kept] == [{number} for number in range(6)]


async def test_a_ranks_buffers_stay_valid_until_it_drops_them(start: Start) -> None:
    async with start() as group:
        bodies = [pattern(200_000, seed) for seed in range(8)]
        for body in bodies:
            group.tell(0, "keep", [body, body[:70_000]])
            await group.ask(0, "echo", [b"\xff" * 200_000])
        sums, _ = await group.ask(0, "check kept")
        assert sums == [zlib.crc32(part) for body in bodies for part in (body, body[:70_000])]


def resident(group: ChannelGroup) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), group.processes[0].pid))


async def test_memory_and_descriptors_are_used_again(start: Start) -> None:
    async with start() as group:
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


async def test_buffers_that_are_kept_cost_no_descriptors(start: Start) -> None:
    async with start() as group:
        theirs, mine = (await group.ask(0, "descriptors"))[0], len(os.listdir("/dev/fd"))
        group.tell(0, "make", count=300, size=70_000, buffer=True)
        kept = await group.take(0, 300)
        for _, buffers in kept:
            group.tell(0, "keep", buffers)
        assert (await group.ask(0, "descriptors"))[0] == theirs
        assert len(os.listdir("/dev/fd")) == mine
        sums, _ = await group.ask(0, "check kept")
        assert sums == [zlib.crc32(bytes([number % 251]) * 70_000) for number in range(300)]


async def test_nothing_stays_open(start: Start) -> None:
    before = sorted(os.listdir("/dev/fd"))
    for _ in range(3):
        async with start(2) as group:
            group.channel.send([0, 1], encode({"do": "echo"}), [pattern(MIB)])
            held = [await group.take(rank) for rank in (0, 1)]
        assert all(bytes(buffers[0]) == pattern(MIB) for [(_, buffers)] in held), (
            "what was received outlives the channel"
        )
        assert sorted(os.listdir("/dev/fd")) == before


# -- threads of a rank


async def test_a_ranks_threads_may_send_while_it_receives(start: Start) -> None:
    async with start() as group:
        group.tell(0, "threads", threads=4, count=200)
        for number in range(200):
            group.tell(0, "echo", echo=number)
        answers = [message for message, _ in await group.take(0, 1000)]
        assert [m["echo"] for m in answers if "echo" in m] == list(range(200))
        for thread in range(4):
            assert [m["number"] for m in answers if m.get("thread") == thread] == list(range(200))


async def test_a_thread_may_send_while_its_rank_waits_for_a_message(start: Start) -> None:
    async with start() as group:
        # Nothing comes from the runner after the command, so the rank's main thread waits in `receive` all the time.
        group.tell(0, "threads", threads=2, count=300)
        assert len(await group.take(0, 600)) == 600


# -- who is gone


@pytest.mark.parametrize("how", ["close", "exit", "kill"])
async def test_the_end_of_a_rank_is_told_once_and_after_its_last_message(start: Start, how: str) -> None:
    async with start(2) as group:
        if how == "close":
            group.tell(0, "make", count=500, size=1000, buffer=False)
            group.tell(0, "close")
        elif how == "exit":
            group.tell(0, "leave", count=500, size=1000)
        else:
            group.processes[0].send_signal(signal.SIGKILL)
        await group.until(lambda: group.closed == [0])
        if how != "kill":
            assert [message["number"] for message, _ in group.received[0]] == list(range(500))
        group.channel.send([0, 1], encode({"do": "echo"}))  # the lost one is ignored
        await group.take(1)
        assert group.closed == [0]


async def test_drain_delivers_what_an_ended_rank_had_sent(start: Start) -> None:
    async with start(2) as group:
        group.tell(0, "leave", count=50, size=1000)
        await asyncio.sleep(0)
        # The loop is not run from here on: the exit status may be the first that the runner hears.
        assert group.processes[0].wait(SECONDS) == 3
        group.channel.drain(0)
        assert [message["number"] for message, _ in group.received[0]] == list(range(50))
        await group.ask(1, "echo")


async def test_drain_of_a_rank_that_never_came(start: Start) -> None:
    async with start(2, connected=False) as group:
        group.processes[0].send_signal(signal.SIGKILL)
        group.processes[0].wait(SECONDS)
        group.channel.drain(0)
        assert group.received[0] == []
        await group.ask(1, "echo")


async def test_a_rank_sees_the_end_of_the_runner(start: Start) -> None:
    async with start(2) as group:
        group.channel.close()
        for rank in (0, 1):
            assert await group.line(rank) == "end"
            assert await asyncio.to_thread(group.processes[rank].wait, SECONDS) == 0


async def test_a_closed_channel_is_quiet(start: Start) -> None:
    async with start() as group:
        group.tell(0, "echo")
        group.channel.close()
        group.channel.close()
        group.channel.send([0], encode({"do": "echo"}))
        assert await group.line(0) == "end"
        assert group.received[0] == []
        assert group.closed == []
