"""One incarnation of the group: its processes, channel, shared page and pipes, from launch until everything is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from drumline import nursery_protocol as wire
from drumline.page import Page, create_file
from drumline.runner.channel.port import Channel
from drumline.runner.nursery import NurseryHandle
from drumline.runner.output import Output
from drumline.runner.status import RankStatus, resident_bytes

#: After the last sign of life of a killed group; the kernel needs far less.
_GONE_SECONDS = 10.0
#: A rank whose channel is closed ends by itself within this time, or is lost.
_CUT_OFF_SECONDS = 1.0
_STACKS_SECONDS = 0.5
_STACKS_SETTLE_SECONDS = 0.02
_ORPHAN_SECONDS = 0.5


class Events(Protocol):
    """Whom an incarnation tells what happened."""

    def on_message(self, rank: int, message: bytes, buffers: list[Any]) -> None:
        """A rank sent a message."""

    def on_spawned(self, rank: int) -> None:
        """A rank has a process now."""

    def on_exited(self, rank: int, exit_code: int | None, number: int | None) -> None:
        """A rank's process ended; everything it sent was delivered before."""

    def on_paused(self, rank: int, paused: bool) -> None:
        """A rank was stopped by a signal, or continued."""

    def on_gone(self) -> None:
        """No process of this incarnation is left."""


@dataclass
class Rank:
    """What is known of one rank's process."""

    pid: int | None = None
    alive: bool = False
    state: str = "starting"
    device: str = ""
    paused: bool = False
    closed: bool = False
    output: Output | None = None
    stacks_reader: int = -1
    stacks: bytearray = field(default_factory=bytearray)


class Incarnation:
    """Processes of one start. ``template`` holds what is the same for every rank."""

    def __init__(
        self, number: int, nursery: NurseryHandle, channel: Channel, template: wire.RankConfig, events: Events
    ):
        self.number = number
        self.world_size = template.world_size
        self.ranks = [Rank() for _ in range(template.world_size)]
        self._nursery = nursery
        self.channel = channel
        self._template = template
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._page_fd = create_file("page", Page.size(template.world_size))
        self.page = Page(self._page_fd, template.world_size)
        self.launched_at = time.monotonic()
        self._gone = False
        self._killed: asyncio.TimerHandle | None = None
        self._closed = False
        self._collected: asyncio.Event | None = None

    # -- start

    def launch(self) -> None:
        """Ask the nursery for every rank, all before any is waited for."""
        self.channel.open(self._message, self._channel_closed)
        for number, rank in enumerate(self.ranks):
            end = self.channel.rank_end(number)
            rank.output = Output(number)
            rank.stacks_reader, stacks_writer = os.pipe()
            os.set_blocking(rank.stacks_reader, False)
            config = self._config(number, end)
            fds = [self._page_fd, rank.output.writer, stacks_writer]
            if end.descriptor is not None:
                fds.insert(0, end.descriptor)
            rank.alive = True
            self._nursery.spawn(self.number, config, fds, has_channel=end.descriptor is not None)
            self.channel.release_rank_end(number)
            rank.output.release_writer()
            os.close(stacks_writer)
            self._loop.add_reader(rank.stacks_reader, self._stacks_readable, rank)
        os.close(self._page_fd)

    def _config(self, number: int, end: Any) -> wire.RankConfig:
        t = self._template
        environment = t.environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        return wire.RankConfig(
            t.reference, number, t.world_size, t.device, t.backend, t.store, t.collective_timeout, environment,
            end.address, end.server_key, end.public_key, end.secret_key,
        )  # fmt: skip

    # -- events

    def _message(self, rank: int, message: bytes, buffers: list[Any]) -> None:
        self._events.on_message(rank, message, buffers)

    def drain_output(self, rank: int) -> None:
        """Log what the rank has printed so far."""
        output = self.ranks[rank].output
        if output is not None:
            output.drain()
            output.finish_line()

    def set_request_id(self, request_id: str) -> None:
        """Tag the ranks' output with ``request_id`` from here on."""
        for rank in self.ranks:
            if rank.output is not None:
                rank.output.request_id = request_id

    def _channel_closed(self, number: int) -> None:
        # The exit status follows from the nursery within milliseconds and tells the story, unless the nursery is gone
        # or the rank lives on without its channel.
        self.ranks[number].closed = True
        if self._nursery.alive:
            self._loop.call_later(_CUT_OFF_SECONDS, self._cut_off, number)
        else:
            self.exited(number, None, None)

    def _cut_off(self, number: int) -> None:
        if self.ranks[number].alive and not self._closed:
            self._events.on_exited(number, None, None)  # kills the group; the processes' ends are then seen as always

    def report(self, report: wire.NurseryReport) -> None:
        """Take a report of the nursery that names this incarnation."""
        match report:
            case wire.Spawned():
                self.ranks[report.rank].pid = report.pid
                self._events.on_spawned(report.rank)
            case wire.Paused():
                rank = self.ranks[report.rank]
                if rank.alive:
                    rank.paused = report.paused
                    self._events.on_paused(report.rank, report.paused)
            case wire.Exited():
                self.exited(report.rank, report.exit_code, report.signal)

    def exited(self, number: int, exit_code: int | None, signal_number: int | None) -> None:
        """The process of rank ``number`` ended."""
        rank = self.ranks[number]
        if not rank.alive:
            return
        self.channel.drain(number)
        self.drain_output(number)
        rank.alive, rank.state = False, "lost"
        self._events.on_exited(number, exit_code, signal_number)
        self._check_gone()

    def _check_gone(self) -> None:
        if not self._gone and not any(rank.alive for rank in self.ranks):
            self._gone = True
            self.close()
            self._events.on_gone()

    def nursery_lost(self) -> None:
        """The nursery died: its ranks die with it; nobody will report their exits."""
        for number, rank in enumerate(self.ranks):
            if rank.alive and rank.pid is not None:  # the kernel kills ranks, nobody else their children
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.pid, signal.SIGKILL)
            if rank.closed:
                self.exited(number, None, None)
        # A remote channel has no EOF; the kernel kills children of a dead parent at once.
        if self._killed is not None:
            self._killed.cancel()
        self._killed = self._loop.call_later(_ORPHAN_SECONDS, self._all_exited)

    def _all_exited(self) -> None:
        for number, rank in enumerate(self.ranks):
            if rank.alive:
                self.exited(number, None, None)

    def kill(self) -> None:
        """Kill every process; ``on_gone`` follows (at once when none is left)."""
        if not any(rank.alive for rank in self.ranks):
            self._loop.call_soon(self._check_gone_again)
            return
        self._nursery.signal(self.number, signal.SIGKILL)
        if self._killed is None:
            self._killed = self._loop.call_later(_GONE_SECONDS, self._nursery.kill)

    def _check_gone_again(self) -> None:
        self._gone = False
        self._check_gone()

    def status(self) -> list[RankStatus]:
        """Return what is known of each rank now."""
        found = []
        for number, rank in enumerate(self.ranks):
            status = RankStatus(number, rank.pid, "paused" if rank.paused else rank.state, rank.device)
            if rank.alive:
                status.rss_bytes = resident_bytes(rank.pid)
                status.step = self.page.step(number)
                if status.state == "ready" and self.page.sequence(number):
                    status.state = "busy"
            found.append(status)
        return found

    # -- stacks

    def _stacks_readable(self, rank: Rank) -> None:
        try:
            data = os.read(rank.stacks_reader, 64 << 10)
        except BlockingIOError:
            return
        if not data:
            self._close_stacks(rank)
            return
        rank.stacks += data
        if self._collected is not None and all(r.stacks for r in self.ranks if r.alive and not r.paused):
            self._loop.call_later(_STACKS_SETTLE_SECONDS, self._collected.set)

    def _close_stacks(self, rank: Rank) -> None:
        if rank.stacks_reader >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(rank.stacks_reader)
            os.close(rank.stacks_reader)
            rank.stacks_reader = -1

    async def collect_stacks(self) -> dict[int, str]:
        """Ask every rank for its threads' stacks; a paused one has none. Takes half a second at most."""
        for rank in self.ranks:
            rank.stacks.clear()
        self._nursery.signal(self.number, signal.SIGUSR1)
        # A handler in C writes them in small pieces within a millisecond; one without any by then is stopped or not set up.
        self._collected = asyncio.Event()
        try:
            async with asyncio.timeout(_STACKS_SECONDS):
                await self._collected.wait()
        except TimeoutError:
            pass
        self._collected = None
        return {n: rank.stacks.decode("utf-8", "replace") for n, rank in enumerate(self.ranks) if rank.stacks}

    def behind(self, candidates: list[int], stacks: dict[int, str]) -> int:
        """Return which of ``candidates`` holds the others up."""
        return next(number for number in self.laggards(stacks) if number in candidates)

    def laggards(self, stacks: dict[int, str]) -> list[int]:
        """Return all ranks, first who holds the others up: paused, else fewest steps, else outside a collective."""

        def key(number: int) -> tuple[bool, int, bool, float]:
            in_collective = "torch/distributed" in stacks.get(number, "")
            paused = self.ranks[number].paused
            return (not paused, self.page.step(number), in_collective, self.page.last_sign(number))

        numbers = range(self.world_size)
        return list(numbers) if self._closed else sorted(numbers, key=key)

    def close(self) -> None:
        """Release pipes, channel and page; leased result memory stays valid."""
        if self._closed:
            return
        self._closed = True
        if self._killed is not None:
            self._killed.cancel()
        self.channel.close()
        for rank in self.ranks:
            if rank.output is not None:
                rank.output.drain()
                rank.output.close()
            self._close_stacks(rank)
        self.page.close()
        with suppress(OSError):
            os.unlink(self._template.store)  # or every restart would leave one behind for as long as the server lives


def make_on_report(current: Callable[[], Incarnation | None]) -> Callable[[wire.NurseryReport], None]:
    """Return a dispatcher that gives reports to the current incarnation and drops those of older ones."""

    def on_report(report: wire.NurseryReport) -> None:
        incarnation = current()
        if incarnation is not None and getattr(report, "incarnation", -1) == incarnation.number:
            incarnation.report(report)

    return on_report
