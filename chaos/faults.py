"""Faults: each breaks one thing of a ready pod, knows what should follow, and checks that it did."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import psutil

from chaos import room
from chaos.clients import Clients
from chaos.clock import ROLLS, Clock
from chaos.model import failure_wrongs
from chaos.schedule import Fault
from chaos.supervisor import Pod

#: Within which a fault must show in the status.
_NOTICED_SECONDS = 30.0
#: A poison that ended so long ago may still take its rank.
_POISON_SECONDS = 1.0
#: The header has whole seconds, and is made once per second.
_CLOCK_SLACK = 5.0
#: Callers that wait for a long answer send nothing for some time.
_REQUESTS_SECONDS = 5.0
Failure = tuple[str, int | None]
_KILLED: set[Failure] = {("Killed", int(signal.SIGKILL))}
_CRASHED: set[Failure] = {("Killed", int(signal.SIGSEGV))}
#: A rank that is stopped while its request is cancelled, or fails elsewhere, is stuck before it is hung.
_HUNG: set[Failure] = {("RankHung", None), ("Stuck", None)}
_UNREPORTED: set[Failure] = {("Exited", None)}


@dataclass
class Breaker:
    """Breaks things, one at a time.

    Attributes:
        pod: what is broken.
        clients: who uses it meanwhile.
        clock: the pod's wall clock, if it has one of its own.
        wrongs: what did not follow as it should.
        slowest: seconds from a fault to readiness, by kind.
    """

    pod: Pod
    clients: Clients
    clock: Clock | None
    wrongs: list[str]
    slowest: dict[str, float] = field(default_factory=dict)

    async def one(self, fault: Fault) -> None:
        """Inject ``fault`` into a ready pod, and wait until it is ready again."""
        began = time.monotonic()
        try:
            await FAULTS[fault.kind](self, fault)
            await self.pod.ready()
        except TimeoutError as error:
            self.wrongs.append(f"fault {fault.number}, {fault.kind}: not over in time: {error}")
        except psutil.NoSuchProcess:
            await self.pod.ready()  # a poison was quicker
        self.pod.dying = False
        self.slowest[fault.kind] = max(self.slowest.get(fault.kind, 0.0), time.monotonic() - began)

    # -- helpers

    async def status_and_pid(self, rank: int) -> tuple[dict[str, Any], int]:
        """Return the status of the ready pod, and the process of ``rank``."""
        while True:
            status = await self.pod.ready()
            if (pid := status["ranks"][rank]["pid"]) is not None:
                return status, pid

    async def take(self, fault: Fault, number: signal.Signals, expected: set[Failure]) -> None:
        """Send a signal to a rank, and check that the group is restarted and names the right one."""
        before, pid = await self.status_and_pid(fault.rank)
        began = time.monotonic()
        self.clients.hit(fault.rank)
        psutil.Process(pid).send_signal(number)
        await self.named(fault, before, began, expected)

    async def named(self, fault: Fault, before: dict[str, Any], began: float, expected: set[Failure]) -> None:
        """Wait for the restart that follows, and check whom it names."""
        after = await self.restarted(before)
        if after is None:
            return  # the server ended meanwhile, which is judged elsewhere
        hit = self.clients.poisoned(began - _POISON_SECONDS)
        wrongs = failure_wrongs(before, after, expected, hit, fault.rank)
        self.wrongs += [f"fault {fault.number}, {fault.kind}: {wrong}" for wrong in wrongs]

    async def restarted(self, before: dict[str, Any]) -> dict[str, Any] | None:
        """Return the first status with another restart, or the last one in time; None when the server is gone."""
        async with asyncio.timeout(_NOTICED_SECONDS):
            status: dict[str, Any] | None = before
            while status is not None and status["restarts"] == before["restarts"]:
                status = await self.pod.status(status["version"])
        return status

    @contextlib.asynccontextmanager
    async def paused(self, process: psutil.Process, seconds: float) -> AsyncIterator[None]:
        """Stop a process for the block, ``seconds`` at least."""
        process.suspend()
        try:
            pause = asyncio.create_task(asyncio.sleep(seconds))  # that long is the fault
            yield
            await pause
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    async def requests(self, count: int) -> None:
        """Wait until ``count`` further requests have begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REQUESTS_SECONDS):
                await self.clients.until(self.clients.count + count)


# -- ranks and their parent


async def kill_rank(breaker: Breaker, fault: Fault) -> None:
    """SIGKILL a rank."""
    await breaker.take(fault, signal.SIGKILL, _KILLED)


async def crash_rank(breaker: Breaker, fault: Fault) -> None:
    """SIGSEGV a rank."""
    await breaker.take(fault, signal.SIGSEGV, _CRASHED)


async def kill_all_ranks(breaker: Breaker, fault: Fault) -> None:
    """SIGKILL every rank at once."""
    before, _ = await breaker.status_and_pid(fault.rank)
    breaker.clients.hit(*range(breaker.pod.ranks))
    for each in before["ranks"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(each["pid"]).kill()
    await breaker.restarted(before)


async def pause_rank(breaker: Breaker, fault: Fault) -> None:
    """Stop a rank for less than the time after which it counts as hung, and continue it: nothing may happen."""
    _, pid = await breaker.status_and_pid(fault.rank)
    async with breaker.paused(psutil.Process(pid), fault.amount * 0.5):
        pass


async def freeze_rank(breaker: Breaker, fault: Fault) -> None:
    """Stop a rank for good: it is hung."""
    await breaker.take(fault, signal.SIGSTOP, _HUNG)


async def pause_server(breaker: Breaker, fault: Fault) -> None:
    """Stop the server, which holds the runner, for a moment."""
    async with breaker.paused(psutil.Process(breaker.pod.process.pid), fault.amount * 0.5):
        pass


async def kill_rank_of_paused_server(breaker: Breaker, fault: Fault) -> None:
    """A rank dies while the runner cannot see it."""
    before, pid = await breaker.status_and_pid(fault.rank)
    began = time.monotonic()
    async with breaker.paused(psutil.Process(breaker.pod.process.pid), fault.amount * 0.5):
        breaker.clients.hit(fault.rank)
        psutil.Process(pid).kill()
    await breaker.named(fault, before, began, _KILLED)


async def pause_nursery(breaker: Breaker, fault: Fault) -> None:
    """Stop the parent of the ranks for a moment; in half of the cases a rank dies meanwhile."""
    before, pid = await breaker.status_and_pid(fault.rank)
    nursery = breaker.pod.nursery()
    if nursery is None:
        return
    began = time.monotonic()
    kills = fault.amount < 0.5
    async with breaker.paused(nursery, fault.amount * 0.8):
        if kills:
            breaker.clients.hit(fault.rank)
            psutil.Process(pid).kill()
    if kills:
        await breaker.named(fault, before, began, _KILLED)


async def freeze_nursery(breaker: Breaker, fault: Fault) -> None:
    """Stop the parent of the ranks for good, and kill one of them, which nobody will report."""
    before, pid = await breaker.status_and_pid(fault.rank)
    nursery = breaker.pod.nursery()
    if nursery is None:
        return
    began = time.monotonic()
    nursery.suspend()
    breaker.clients.hit(fault.rank)
    psutil.Process(pid).kill()
    await breaker.named(fault, before, began, _UNREPORTED)


async def kill_nursery(breaker: Breaker, fault: Fault) -> None:
    """SIGKILL the parent of the ranks: they go with it, and all come back."""
    before, _ = await breaker.status_and_pid(fault.rank)
    nursery = breaker.pod.nursery()
    if nursery is None:
        return
    began = time.monotonic()
    breaker.clients.hit(-1)
    nursery.kill()
    after = await breaker.restarted(before)
    failure = (after or {}).get("lastFailure") or {}
    if (
        after is not None
        and failure.get("reason") != "ParentLost"
        and not breaker.clients.poisoned(began - _POISON_SECONDS)
    ):
        breaker.wrongs.append(f"fault {fault.number}, {fault.kind}: lastFailure says {failure}")


# -- the server


async def kill_server(breaker: Breaker, fault: Fault) -> None:
    """SIGKILL the server: everything below it must go, and a new one comes."""
    del fault
    await breaker.pod.end(signal.SIGKILL)


async def drain_server(breaker: Breaker, fault: Fault) -> None:
    """SIGTERM the server in the middle of everything, as a rolling update does."""
    del fault
    await breaker.pod.end(signal.SIGTERM)
    if (code := breaker.pod.ends[-1]) != 0:
        breaker.wrongs.append(f"a server that was to drain ended with {code}: {breaker.pod.tail()}")


# -- clients


async def drop_clients(breaker: Breaker, fault: Fault) -> None:
    """All connections break."""
    await breaker.requests(2)
    del fault
    breaker.clients.drop()


async def cancel_all(breaker: Breaker, fault: Fault) -> None:
    """Every request that waits or runs is cancelled."""
    await breaker.requests(2)
    del fault
    await breaker.clients.cancel_all()


async def burst(breaker: Breaker, fault: Fault) -> None:
    """More requests than may wait."""
    await breaker.clients.burst(20 + int(fault.amount * 30))


# -- what is around it


async def fill_disk(breaker: Breaker, fault: Fault) -> None:
    """No room for temporary files, while requests come; nothing may happen."""
    with room.filled(breaker.pod.temp, inodes=fault.amount < 0.3):
        await breaker.requests(4)


async def fill_disk_and_kill_rank(breaker: Breaker, fault: Fault) -> None:
    """The group cannot come back while there is no room, and must when there is."""
    with room.filled(breaker.pod.temp, inodes=fault.amount < 0.3):
        breaker.clients.hit(*range(breaker.pod.ranks), -1)
        await kill_rank(breaker, fault)
        await asyncio.sleep(fault.amount)  # so long it stays full
    breaker.clients.hit(*range(breaker.pod.ranks), -1)


async def fill_disk_and_kill_server(breaker: Breaker, fault: Fault) -> None:
    """The server cannot start while there is no room: it ends, is started again, and must come back when there is."""
    with room.filled(breaker.pod.temp, inodes=fault.amount < 0.5):
        await breaker.pod.end(signal.SIGKILL)
        await asyncio.sleep(fault.amount * 3)  # so long it stays full


async def fill_shm(breaker: Breaker, fault: Fault) -> None:
    """No room in ``/dev/shm``, while requests come; nothing may happen."""
    with room.filled(room.SHM, inodes=fault.amount < 0.3):
        await breaker.requests(4)


async def fill_shm_and_kill_rank(breaker: Breaker, fault: Fault) -> None:
    """The group comes back without any ``/dev/shm``."""
    with room.filled(room.SHM, inodes=fault.amount < 0.3):
        await kill_rank(breaker, fault)
        await breaker.pod.ready()


async def roll_clock(breaker: Breaker, fault: Fault) -> None:
    """Set the wall clock while a request has a time-out: it holds all the same, to the moment."""
    assert breaker.clock is not None
    offset = ROLLS[int(fault.amount * len(ROLLS))]
    seconds = 0.3
    async with asyncio.TaskGroup() as group:
        group.create_task(breaker.clients.ask_hasty(seconds))
        await asyncio.sleep(seconds / 3)  # in the middle of it
        breaker.clock.roll(offset)
    try:
        async with asyncio.timeout(_NOTICED_SECONDS):
            while abs(await _off(breaker.pod) - offset) > _CLOCK_SLACK:
                await asyncio.sleep(0.1)  # nothing tells when it sees the new clock
    except TimeoutError:
        found = await _off(breaker.pod)
        breaker.wrongs.append(f"fault {fault.number}: the clock was set to {offset:+} s and is at {found:+.0f} s")


async def _off(pod: Pod) -> float:
    """Return by how many seconds the server's ``Date`` is after the real one."""
    date = await pod.date()
    return parsedate_to_datetime(date).timestamp() - time.time() if date is not None else math.inf


async def roll_clock_and_kill_rank(breaker: Breaker, fault: Fault) -> None:
    """Set the wall clock while the group restarts."""
    assert breaker.clock is not None
    before, pid = await breaker.status_and_pid(fault.rank)
    began = time.monotonic()
    breaker.clients.hit(fault.rank)
    psutil.Process(pid).kill()
    breaker.clock.roll(ROLLS[int(fault.amount * len(ROLLS))])
    await breaker.named(fault, before, began, _KILLED)


FAULTS: dict[str, Callable[[Breaker, Fault], Awaitable[None]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        kill_rank, crash_rank, kill_all_ranks, pause_rank, freeze_rank, pause_server, kill_rank_of_paused_server,
        pause_nursery, freeze_nursery, kill_nursery, kill_server, drain_server, drop_clients, cancel_all, burst, fill_disk,
        fill_disk_and_kill_rank, fill_disk_and_kill_server, fill_shm, fill_shm_and_kill_rank, roll_clock,
        roll_clock_and_kill_rank,
    )
}  # fmt: skip
#: What needs a room (see :mod:`chaos.room`), and what needs a clock (see :mod:`chaos.clock`).
NEED_ROOM = {kind for kind in FAULTS if kind.startswith("fill-")}
NEED_CLOCK = {kind for kind in FAULTS if kind.startswith("roll-")}
