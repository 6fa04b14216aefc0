"""The runner's end of a channel with one obedient process per rank at its other end; for tests of channels."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

from drumline.runner.channel.port import Channel

encode = msgspec.msgpack.encode


class ChannelGroup:
    """The runner's end of ``channel``, and one process per rank that runs ``drumline.testing.rank_end``.

    Attributes:
        received: per rank, messages (decoded) and buffers that nobody took yet.
        closed: ranks whose end was told, in this order.
    """

    def __init__(self, channel: Channel, world_size: int) -> None:
        self.channel = channel
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: dict[int, list[tuple[Any, list[Any]]]] = defaultdict(list)
        self.closed: list[int] = []
        self._changed = asyncio.Event()
        channel.open(self._on_message, self._on_closed)
        for rank in range(world_size):
            end = channel.rank_end(rank)
            self.processes.append(
                subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "drumline.testing.rank_end", msgspec.json.encode(end).decode()],
                    pass_fds=[] if end.descriptor is None else [end.descriptor],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            channel.release_rank_end(rank)

    def _on_message(self, rank: int, message: bytes, buffers: list[Any]) -> None:
        assert rank not in self.closed, "a message after the end"
        self.received[rank].append((msgspec.msgpack.decode(message), buffers))
        self._changed.set()

    def _on_closed(self, rank: int) -> None:
        assert rank not in self.closed, "closed twice"
        self.closed.append(rank)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is looked at after every message and every end."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def take(self, rank: int, count: int = 1) -> list[tuple[Any, list[Any]]]:
        """Wait for the next ``count`` messages of ``rank``; return them with their buffers."""
        await self.until(lambda: len(self.received[rank]) >= count)
        taken, self.received[rank] = self.received[rank][:count], self.received[rank][count:]
        return taken

    def tell(self, rank: int, do: str, buffers: list[Any] | None = None, **arguments: Any) -> None:
        """Send one command."""
        self.channel.send([rank], encode({"do": do, **arguments}), buffers or [])

    async def ask(
        self, rank: int, do: str, buffers: list[Any] | None = None, **arguments: Any
    ) -> tuple[Any, list[Any]]:
        """Send one command and wait for the next message."""
        self.tell(rank, do, buffers, **arguments)
        [answer] = await self.take(rank)
        return answer

    async def line(self, rank: int) -> str:
        """Wait for what the rank's process says next on its standard output."""
        stdout = self.processes[rank].stdout
        assert stdout is not None
        return (await asyncio.to_thread(stdout.readline)).decode().strip()

    def resume(self, rank: int) -> None:
        """End the rank's ``pause``."""
        stdin = self.processes[rank].stdin
        assert stdin is not None
        stdin.write(b"!")
        stdin.flush()

    async def close(self) -> None:
        """Close the channel, then end the processes."""
        self.channel.close()
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
