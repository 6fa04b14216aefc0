"""Kills, cancels and disconnects at random: whoever waits gets the truth, and afterwards everything is as before.

The numbers are seeded; ``DRUMTEST_SEED`` chooses others.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from drumline import codec
from drumline.distributed import DistributedRunner
from drumline.errors import DrumlineError, RankLost, RequestCancelled
from drumline.runner.incarnation import _CUT_OFF_SECONDS
from drumline.runner.runner import RestartPolicy
from drumline.runner.state import VERDICT_SECONDS
from drumline.runner.status import RunnerStatus
from drumline.runner.ticket import Ticket
from drumline.testing.workers import Steps

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = int(os.environ.get("DRUMTEST_SEED", "20"))
RANKS = 2
KILLS = 200
STREAMS = 2000
CALLERS = 8
KILL_EVERY = 60


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The group is shared and restarted all the time."""
    print(f"DRUMTEST_SEED={SEED}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[DistributedRunner]:
    policy = RestartPolicy(max_restarts=10_000, backoff_seconds=0)
    runner = DistributedRunner(Steps, world_size=RANKS, device="cpu", cancel_grace=5, restart=policy)
    async with asyncio.timeout(50):
        await runner.start()
    yield runner
    await runner.stop()


def living(status: RunnerStatus) -> list[int]:
    """The ranks' processes, once all of them exist."""
    pids = [rank.pid for rank in status.ranks if rank.pid is not None and rank.state != "lost"]
    return pids if len(pids) == RANKS else []


async def outcome(ticket: Ticket, tag: str, read: int) -> DrumlineError | None:
    """How a request ended; what it had sent until then (``read`` updates were read before) is complete and its own."""
    error = None
    try:
        packed = await asyncio.wait_for(ticket.result(), 20)
        assert codec.unpack(packed.data, packed.buffers)["tag"] == tag
    except DrumlineError as caught:
        error = caught
    updates = [codec.unpack(update.data, update.buffers) async for update in ticket.updates()]
    assert updates == [{"step": n, "tag": tag, "rank": 0} for n in range(read, read + len(updates))]
    return error


@pytest.mark.timeout(120)  # a quarter of that on an idle machine
async def test_200_kills_in_a_row(group: DistributedRunner, until: Any) -> None:
    chance = random.Random(SEED)
    phases: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for number in range(KILLS):
        phase = chance.choice(["start", "idle", "invoke", "stream", "cancel"])
        phases[phase] += 1
        victim = chance.randrange(RANKS)
        tickets: dict[str, Ticket] = {}
        read = 0
        if phase != "start":
            await until(group, lambda status: status.state == "ready")
        if phase in {"invoke", "stream", "cancel"}:
            for name, steps in (("first", chance.choice([40, 400])), ("second", 5)):
                payload = {"steps": steps, "tag": f"{number} {name}", "collective": chance.random() < 0.7}
                tickets[payload["tag"]] = group.submit(payload, streaming=phase != "invoke")
            first = next(iter(tickets.values()))
            if phase == "invoke":
                await asyncio.sleep(chance.random() * 0.01)  # somewhere in its steps
            else:
                read = chance.randrange(1, 40)
                for _ in range(read):
                    await first.next()
            if phase == "cancel":
                first.cancel()
        pids = await until(group, living)
        os.kill(pids[victim], signal.SIGKILL)
        await until(group, lambda status, restarts=number + 1: status.restarts == restarts, 5)
        failure = group.status.last_failure
        assert failure is not None
        assert (failure.rank, failure.signal) == (victim, signal.SIGKILL), phase
        lost = 0
        for tag, ticket in tickets.items():
            error = await outcome(ticket, tag, read if ticket is first else 0)
            outcomes[type(error).__name__] += 1
            if isinstance(error, RankLost):
                lost += 1
                assert (error.rank, error.signal) == (victim, signal.SIGKILL), phase
            else:
                assert error is None or (phase == "cancel" and isinstance(error, RequestCancelled))
        assert lost <= 1, "only one of them was running"
    assert (await group.invoke({"steps": 3, "tag": "works"}, timeout=20))["tag"] == "works"
    assert group.status.restarts == KILLS
    nursery = psutil.Process(living(group.status)[0]).parent()
    assert nursery is not None
    assert {child.pid for child in nursery.children()} == set(living(group.status))
    print(f"{dict(phases)} {dict(outcomes)}")
    assert min(outcomes["NoneType"], outcomes["RankLost"]) > KILLS // 10


async def test_a_peers_error_waits_for_a_loss_that_nobody_reports(group: DistributedRunner, until: Any) -> None:
    """The ranks' parent is stopped, so that only the closed channel tells of the loss, a second later."""
    assert VERDICT_SECONDS > _CUT_OFF_SECONDS, "or chance decides who is told"
    before = group.status.restarts
    pids = await until(group, lambda status: status.state == "ready" and living(status))
    doomed = group.submit({"steps": 100_000, "seconds": 0.001}, streaming=True)
    await doomed.next()
    parent = psutil.Process(pids[0]).parent()
    assert parent is not None
    parent.suspend()
    try:
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RankLost) as caught:
            await asyncio.wait_for(doomed.result(), 10)
    finally:
        parent.resume()
    assert caught.value.rank == 1
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", 20)


class Reader:
    """One caller with a secret, who reads one stream after the other and does not always stay to the end."""

    def __init__(self, group: DistributedRunner, name: str, seed: str) -> None:
        self.group = group
        self.name = name
        self.chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()

    async def read(self, count: int) -> None:
        for number in range(count):
            steps = self.chance.randrange(1, 15)
            tag = f"{self.name}-{number}-{self.chance.getrandbits(64):x}"
            payload = {"steps": steps, "tag": tag, "collective": self.chance.random() < 0.25}
            leave_after = self.chance.randrange(steps + 1) if self.chance.random() < 0.2 else None
            how = self.chance.choice([self.values, self.ticket, self.text])
            self.outcomes[await asyncio.wait_for(how(payload, leave_after), 30)] += 1

    def check(self, updates: list[Any], payload: dict[str, Any]) -> None:
        assert updates == [{"step": n, "tag": payload["tag"], "rank": 0} for n in range(len(updates))]

    async def values(self, payload: dict[str, Any], leave_after: int | None) -> str:
        events: list[Any] = []
        stream = self.group.stream(payload)
        try:
            async for event in stream:
                events.append(event)
                if leave_after is not None and len(events) > leave_after:
                    await stream.aclose()  # type: ignore[attr-defined]
                    self.check(events[: payload["steps"]], payload)
                    return "left"
        except RankLost:
            self.check(events, payload)
            return "lost"
        *updates, result = events
        self.check(updates, payload)
        assert len(updates) == payload["steps"]
        assert (result["tag"], result["steps"]) == (payload["tag"], payload["steps"])
        return "finished"

    async def ticket(self, payload: dict[str, Any], leave_after: int | None) -> str:
        ticket = self.group.submit(payload, streaming=True, caller=self.name)
        updates = []
        async for update in ticket.updates():
            updates.append(codec.unpack(update.data, update.buffers))
            if leave_after is not None and len(updates) > leave_after:
                ticket.cancel()
        self.check(updates, payload)
        try:
            packed = await ticket.result()
        except RankLost:
            return "lost"
        except RequestCancelled:
            assert leave_after is not None
            return "cancelled"
        assert codec.unpack(packed.data, packed.buffers)["tag"] == payload["tag"]
        assert len(updates) == payload["steps"]
        return "finished"

    async def text(self, payload: dict[str, Any], leave_after: int | None) -> str:
        stream = self.group.stream(payload, as_text_events=True)
        events = []
        async for chunk in stream:
            kind, id, data = (line.split(b": ", 1)[1] for line in chunk.strip().split(b"\n"))
            events.append((kind.decode(), json.loads(data)))
            assert int(id) == len(events) - 1
            if leave_after is not None and len(events) > leave_after:
                await stream.aclose()  # type: ignore[attr-defined]
                break
        kinds = [kind for kind, _ in events]
        self.check([data for kind, data in events if kind == "update"], payload)
        if kinds[-1] == "update":
            assert leave_after is not None
            return "left"
        assert [kind for kind in kinds if kind != "update"] == kinds[-1:], "exactly one terminal event, the last one"
        if kinds[-1] == "error":
            assert events[-1][1]["type"].endswith("/rank-lost")
            return "lost"
        assert len(events) == payload["steps"] + 1
        assert events[-1][1]["tag"] == payload["tag"]
        return "finished"


@pytest.mark.timeout(120)  # a quarter of that on an idle machine
async def test_2000_interleaved_streams(group: DistributedRunner, until: Any) -> None:
    chance = random.Random(SEED)
    before = group.status.restarts
    readers = [Reader(group, f"caller{n}", f"{SEED} {n}") for n in range(CALLERS)]

    async def kill() -> None:
        for kills in range(1, STREAMS // KILL_EVERY):
            await until(group, lambda _, done=kills * KILL_EVERY: sum(r.outcomes.total() for r in readers) >= done, 50)
            pids = await until(group, lambda status: status.state == "ready" and living(status))
            os.kill(chance.choice(pids), signal.SIGKILL)
            await until(group, lambda status, count=before + kills: status.restarts == count, 5)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(kill())
        for reader in readers:
            tasks.create_task(reader.read(STREAMS // CALLERS))
    outcomes = sum((reader.outcomes for reader in readers), Counter[str]())
    print(dict(outcomes), f"{group.status.restarts - before} kills")
    assert outcomes.total() == STREAMS
    assert outcomes["finished"] > STREAMS // 2
    assert min(outcomes[kind] for kind in ("left", "cancelled", "lost")) > 0
    assert outcomes["lost"] <= group.status.restarts - before
    assert (await group.invoke({"steps": 3, "tag": "works"}, timeout=20))["tag"] == "works"
