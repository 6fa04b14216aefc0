"""One contract, two channels: who is slow, who is gone, what stays open; over socket pairs and over ZeroMQ with CURVE."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest

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


# -- what stays open


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
        group.tell(0, "leave", count=120, size=200)  # more than a channel reads ahead, less than blocks the rank
        await asyncio.sleep(0)
        # The loop is not run from here on: the exit status may be the first that the runner hears.
        assert group.processes[0].wait(SECONDS) == 3
        group.channel.drain(0)
        assert [message["number"] for message, _ in group.received[0]] == list(range(120))
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


async def test_a_closed_channel_keeps_neither_its_buffer_nor_who_listened() -> None:
    """A server that restarts its ranks often would grow: the garbage collector counts objects, not their bytes."""

    class Listener:
        def __init__(self) -> None:
            self.channel = LocalChannel(1)
            self.channel.open(self.message, self.closed)

        def message(self, rank: int, data: bytes, buffers: list[Any]) -> None: ...

        def closed(self, rank: int) -> None: ...

    gc.disable()
    try:
        listener = Listener()
        gone = weakref.ref(listener.channel)
        listener.channel.close()
        del listener
        assert gone() is None
    finally:
        gc.enable()
