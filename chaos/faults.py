"""Faults: each breaks one thing of a ready pod, knows what should follow, and checks that it did."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psutil

from chaos.supervisor import Pod

Fault = Callable[["Breaker"], Awaitable[None]]


@dataclass
class Breaker:
    """Breaks things, one at a time.

    Attributes:
        pod: what is broken.
        dice: all choices.
        wrongs: what did not follow as it should.
    """

    pod: Pod
    dice: random.Random
    wrongs: list[str]

    async def one(self, name: str) -> None:
        """Inject fault ``name`` into a ready pod, and wait until it is ready again."""
        await self.pod.ready()
        await FAULTS[name](self)
        try:
            await self.pod.ready()
        except TimeoutError as error:
            self.wrongs.append(f"{name}: {error}")

    # -- helpers

    async def rank(self) -> tuple[int, psutil.Process | None, dict[str, Any]]:
        """Choose a rank; return it, its process and the status it was found in."""
        status = await self.pod.ready()
        rank = self.dice.randrange(self.pod.ranks)
        pid = status["ranks"][rank]["pid"]
        try:
            return rank, psutil.Process(pid), status
        except (psutil.NoSuchProcess, TypeError):
            return rank, None, status

    async def lost(self, rank: int, before: dict[str, Any], lives: int, what: signal.Signals) -> None:
        """Wait until the group has been restarted, and check that it names the right rank."""
        deadline = time.monotonic() + 30
        status: dict[str, Any] | None = before
        while time.monotonic() < deadline and self.pod.lives == lives:
            status = await self.pod.status(status["version"] if status else None)
            if status is None:
                continue
            failure = status.get("lastFailure") or {}
            if status["restarts"] > before["restarts"] and failure:
                # A poisoned request may bring the group down in the same moment; that is another failure than ours.
                ours = failure["reason"] == "RankHung" if what == signal.SIGSTOP else failure.get("signal") == what
                if ours and failure.get("rank") != rank:
                    self.wrongs.append(f"{what.name} of rank {rank}: lastFailure says {failure}")
                return
        if self.pod.lives == lives:
            self.wrongs.append(f"{what.name} of rank {rank} was not noticed: {status}")


async def _signal_rank(breaker: Breaker, number: signal.Signals) -> None:
    lives = breaker.pod.lives
    rank, process, before = await breaker.rank()
    if process is None:
        return
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
    await breaker.lost(rank, before, lives, number)


async def kill_rank(breaker: Breaker) -> None:
    """SIGKILL a rank."""
    await _signal_rank(breaker, signal.SIGKILL)


async def crash_rank(breaker: Breaker) -> None:
    """SIGSEGV a rank."""
    await _signal_rank(breaker, signal.SIGSEGV)


async def kill_all_ranks(breaker: Breaker) -> None:
    """SIGKILL every rank at once."""
    status = await breaker.pod.ready()
    for each in status["ranks"]:
        try:
            psutil.Process(each["pid"]).kill()
        except (psutil.NoSuchProcess, TypeError):
            continue


async def pause_rank(breaker: Breaker) -> None:
    """Stop a rank for less than the time after which it counts as hung, and continue it: nothing may happen."""
    _, process, _ = await breaker.rank()
    if process is None:
        return
    try:
        process.suspend()
        await asyncio.sleep(breaker.dice.random() * 0.5)  # that long is the fault
        process.resume()
    except psutil.NoSuchProcess:
        return


async def freeze_rank(breaker: Breaker) -> None:
    """Stop a rank for good: it is hung."""
    lives = breaker.pod.lives
    rank, process, before = await breaker.rank()
    if process is None:
        return
    try:
        process.suspend()
    except psutil.NoSuchProcess:
        return
    await breaker.lost(rank, before, lives, signal.SIGSTOP)


async def kill_nursery(breaker: Breaker) -> None:
    """SIGKILL the parent of the ranks: they go with it, and all come back."""
    nursery = breaker.pod.nursery()
    if nursery is not None:
        nursery.kill()


async def kill_server(breaker: Breaker) -> None:
    """SIGKILL the server: everything below it must go, and a new one comes."""
    await _end_server(breaker, signal.SIGKILL)


async def drain_server(breaker: Breaker) -> None:
    """SIGTERM the server in the middle of everything, as a rolling update does."""
    await _end_server(breaker, signal.SIGTERM)


async def _end_server(breaker: Breaker, number: signal.Signals) -> None:
    lives = breaker.pod.lives
    breaker.pod.dying = True
    breaker.pod.process.send_signal(number)
    async with asyncio.timeout(60):
        while breaker.pod.lives == lives:
            await breaker.pod.changed.wait()


FAULTS: dict[str, Fault] = {
    "kill-rank": kill_rank,
    "crash-rank": crash_rank,
    "kill-all-ranks": kill_all_ranks,
    "pause-rank": pause_rank,
    "freeze-rank": freeze_rank,
    "kill-nursery": kill_nursery,
    "kill-server": kill_server,
    "drain-server": drain_server,
}
WEIGHTS: dict[str, int] = {
    "kill-rank": 10,
    "crash-rank": 4,
    "kill-all-ranks": 3,
    "pause-rank": 6,
    "freeze-rank": 2,
    "kill-nursery": 3,
    "kill-server": 1,
    "drain-server": 1,
}
