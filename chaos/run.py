"""One run: clients and faults side by side, an audit now and then, and the restart budget in the end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chaos import budget, room
from chaos.audit import Auditor
from chaos.clients import Clients
from chaos.clock import Clock, available
from chaos.faults import Breaker
from chaos.model import Ledger
from chaos.report import Report
from chaos.schedule import Fault
from chaos.supervisor import Pod
from drumline.contract import RestartSettings

RANKS = 2
CALLERS = 6
_AUDIT_EVERY = 25


async def run(seed: int, faults: list[Fault], callers: int, folder: Path, limit: float) -> Report:
    """Work off ``faults`` until something is wrong.

    Args:
        seed: of the clients' choices.
        faults: see :mod:`chaos.schedule`.
        callers: clients at a time.
        folder: an empty one, for everything.
        limit: seconds after which no other fault begins.
    """
    report, began = Report(seed, callers, RANKS), time.monotonic()
    with _surroundings(folder) as clock:
        ledger = Ledger()
        environment = clock.environment if clock is not None else {}
        endless = RestartSettings(max_restarts=len(faults) * 100 + 100, backoff_seconds=0.05, max_backoff_seconds=0.5)
        async with Pod(folder, RANKS, endless, environment) as pod:
            await _break(pod, ledger, clock, report, faults, callers, limit)
            if ledger.wrongs or pod.problems:
                print(pod.tail(), file=sys.stderr)
        wrongs = ledger.wrongs + pod.problems
        report.lives = pod.lives
        if not wrongs:
            tight = RestartSettings(max_restarts=budget.MAX_RESTARTS, backoff_seconds=0)
            async with Pod(folder, RANKS, tight, environment) as pod:
                await budget.use_up(pod, wrongs, faults[-1])
            report.lives += pod.lives
            report.budgets = 1
            wrongs += pod.problems
    report.outcomes, report.wrongs = ledger.ends, wrongs
    report.seconds = time.monotonic() - began
    return report


async def _break(
    pod: Pod, ledger: Ledger, clock: Clock | None, report: Report, faults: list[Fault], callers: int, limit: float
) -> None:
    clients = Clients(pod, ledger, report.seed)
    breaker = Breaker(pod, clients, clock, ledger.wrongs)
    auditor = Auditor(pod, clients, ledger)
    await pod.ready()
    calling = asyncio.create_task(clients.run(callers))
    began = time.monotonic()
    await clients.until(callers)
    await auditor.look(0)
    for done, fault in enumerate(faults, 1):
        await breaker.one(fault)
        report.faults[fault.kind] = report.faults.get(fault.kind, 0) + 1
        late = time.monotonic() - began > limit
        if done % _AUDIT_EVERY == 0 or done == len(faults) or late:
            await auditor.look(done)
            print(f"{done} faults, {clients.count} requests, {time.monotonic() - began:.0f} s", flush=True)
        if ledger.wrongs or pod.problems or calling.done():
            ledger.wrongs.append(f"the last fault was {fault}")
            break
        if late:
            break
        await _some_requests(clients, calling, fault.then)
    clients.over = True
    await calling
    auditor.conclude()
    report.requests, report.slowest, report.slopes = clients.count, breaker.slowest, auditor.slopes()


async def _some_requests(clients: Clients, calling: asyncio.Task[None], count: int) -> None:
    """Let requests begin before the next fault."""
    reached = asyncio.create_task(clients.until(clients.count + count))
    await asyncio.wait([reached, calling], timeout=60, return_when=asyncio.FIRST_COMPLETED)
    reached.cancel()


@contextlib.contextmanager
def _surroundings(folder: Path) -> Iterator[Clock | None]:
    disk = folder / "tmp"
    disk.mkdir()
    if room.inside():
        room.furnish(disk)
    clock = Clock(folder) if available() else None
    try:
        yield clock
    finally:
        if clock is not None:
            clock.close()
        if room.inside():
            room.clear(disk)
