"""Notices ranks that make no progress: hung in a request, or stopped by a signal at any time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from drumline.errors import RankHung
from drumline.runner.incarnation import Incarnation
from drumline.runner.state import Flight, Group

log = logging.getLogger("drumline.runner")


class HangWatch:
    """One timer for the running request (re-armed from the newest heartbeat, never polled) and one per stopped rank."""

    def __init__(
        self,
        group: Group,
        hang_timeout: float,
        lost: Callable[[RankHung], None],
        spawn_task: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._group = group
        self._timeout = hang_timeout
        self._lost = lost
        self._spawn_task = spawn_task
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._paused: dict[int, asyncio.TimerHandle] = {}
        self._watched: tuple[Incarnation, int, float]

    def watch(self, incarnation: Incarnation, sequence: int, started_at: float) -> None:
        """Watch request ``sequence``, which the ranks were given at ``started_at`` (monotonic seconds)."""
        self._watched = (incarnation, sequence, started_at)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._look)

    def _look(self) -> None:
        self._timer = None
        flight, (incarnation, sequence, started_at) = self._group.flight, self._watched
        if flight is None or flight.sequence != sequence:
            return
        waiting = [rank for rank in range(self._group.world_size) if rank not in flight.answers]
        # The group hangs when none of the ranks that still owe an answer has shown progress for so long.
        last = max([started_at, *(incarnation.page.last_sign(rank) for rank in waiting)])
        left = last + self._timeout - time.monotonic()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._spawn_task(self._hung(incarnation, flight, waiting))

    async def _hung(self, incarnation: Incarnation, flight: Flight, waiting: list[int]) -> None:
        stacks = await incarnation.collect_stacks()
        if self._group.flight is not flight:
            return
        rank = incarnation.behind(waiting, stacks)
        step = incarnation.page.step(rank)
        for number, stack in stacks.items():
            log.error("stacks of rank %d, whose group hangs:\n%s", number, stack)
        text = f"rank {rank} made no progress for {self._timeout:g} s (step {step})"
        self._lost(RankHung(rank, step=step, stacks=stacks, message=text))

    def paused(self, incarnation: Incarnation, rank: int, paused: bool) -> None:
        """``rank`` was stopped by a signal, or continued."""
        timer = self._paused.pop(rank, None)
        if timer is not None:
            timer.cancel()
        if paused:
            self._paused[rank] = self._loop.call_later(self._timeout, self._paused_too_long, incarnation, rank)

    def _paused_too_long(self, incarnation: Incarnation, rank: int) -> None:
        self._paused.pop(rank, None)
        text = f"rank {rank} was stopped by a signal {self._timeout:g} s ago and not continued"
        self._lost(RankHung(rank, step=incarnation.page.step(rank), message=text))

    def forget_paused(self) -> None:
        """The incarnation is gone."""
        for timer in self._paused.values():
            timer.cancel()
        self._paused.clear()

    def cancel(self) -> None:
        """Watch nothing any more."""
        self.forget_paused()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
