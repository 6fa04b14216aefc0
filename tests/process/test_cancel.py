"""Cancelled requests: all ranks leave at the same step, and nothing of the request is left in the next one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
import torch

from drumline import codec
from drumline.distributed import DistributedRunner
from drumline.errors import Draining, DrumlineError, NotReady, RequestCancelled, RequestTimeout
from drumline.runner.observer import Observer
from drumline.runner.runner import RestartPolicy
from drumline.runner.ticket import Ticket
from drumline.testing.workers import Steps

pytestmark = pytest.mark.asyncio(loop_scope="module")

RANKS = 3
GRACE = 0.5
CANCELS = 200
LONG = {"steps": 100_000, "seconds": 0.0005}


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The group is shared, and restarted by some tests."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[DistributedRunner]:
    policy = RestartPolicy(max_restarts=1000, backoff_seconds=0)
    runner = DistributedRunner(Steps, world_size=RANKS, device="cpu", cancel_grace=GRACE, restart=policy)
    async with asyncio.timeout(50):
        await runner.start()
    yield runner
    await runner.stop()


class Tickets(Observer):
    """Every ticket in the order in which they were queued."""

    def __init__(self) -> None:
        self.all: list[Ticket] = []
        self.queued = asyncio.Event()

    def request_queued(self, ticket: Ticket) -> None:
        self.all.append(ticket)
        self.queued.set()


@pytest.fixture
def tickets(group: DistributedRunner) -> Iterator[Tickets]:
    observer = Tickets()
    group.observers.append(observer)
    yield observer
    group.observers.remove(observer)


async def by_ticket(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    ticket = group.submit(payload, streaming=True)
    for _ in range(updates):
        await ticket.next()
    ticket.cancel("changed my mind")
    with pytest.raises(RequestCancelled, match="changed my mind"):
        await ticket.result()


async def by_task(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    task = asyncio.create_task(group.invoke(payload))
    asyncio.get_running_loop().call_later(updates * 0.001, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_name(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    ticket = group.submit(payload, request_id="my-request", streaming=True)
    for _ in range(updates):
        await ticket.next()
    assert group.cancel("my-request") is True
    with pytest.raises(RequestCancelled):
        await ticket.result()
    assert group.cancel("my-request") is False


async def by_timeout(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    with pytest.raises(RequestTimeout):
        await group.invoke(payload, timeout=0.001 + updates * 0.001)


async def by_closing(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    stream = group.stream(payload)
    for _ in range(updates + 1):
        await anext(stream)
    await stream.aclose()


async def by_closing_text(group: DistributedRunner, payload: dict[str, Any], updates: int) -> None:
    stream = group.stream(payload, as_text_events=True)
    for _ in range(updates + 1):
        await anext(stream)
    await stream.aclose()


WAYS = [by_ticket, by_task, by_name, by_timeout, by_closing, by_closing_text]


async def test_200_cancelled_requests_leave_no_trace(group: DistributedRunner, tickets: Tickets) -> None:
    usual = {"steps": 5, "seed": 7}
    undisturbed = (await group.invoke(usual))["state"]
    chance = random.Random(20)
    before = group.status
    stopped = 0
    steps = set()
    while stopped < CANCELS:
        tickets.all.clear()
        way = chance.choice(WAYS)
        payload = {**LONG, "collective": chance.random() < 0.7, "every_rank": chance.random() < 0.3}
        if not payload["collective"]:
            payload["seconds"] = 0.001
        await asyncio.wait_for(way(group, payload, chance.randrange(12)), 10)
        # Sent before the cancelled one is out of the ranks, more often than not.
        result = await asyncio.wait_for(group.invoke(usual), 10)
        assert torch.equal(result["state"], undisturbed), f"after {way.__name__} {payload}"
        [ticket, _] = tickets.all
        if ticket.started_at is None:
            assert ticket.outcome in {"cancelled", "queue-timeout"}
            continue
        stopped += 1
        assert ticket.outcome == ("request-timeout" if way is by_timeout else "cancelled")
        assert set(ticket.stopped_steps) == set(range(RANKS)), f"after {way.__name__} {payload}"
        assert len(set(ticket.stopped_steps.values())) == 1
        steps.update(ticket.stopped_steps.values())
    assert len(steps) > 5, "they were cancelled at all times"
    assert group.status.restarts == before.restarts
    assert [rank.pid for rank in group.status.ranks] == [rank.pid for rank in before.ranks]


async def test_the_error_tells_the_step(group: DistributedRunner) -> None:
    ticket = group.submit(LONG, streaming=True)
    for _ in range(4):
        await ticket.next()
    ticket.cancel()
    with pytest.raises(RequestCancelled) as caught:
        await asyncio.wait_for(ticket.result(), 5)
    assert caught.value.step == ticket.stopped_steps[0] > 4
    updates = [codec.unpack(u.data, u.buffers)["step"] async for u in ticket.updates()]
    assert updates == list(range(4, caught.value.step - 1))  # step n sends its update n - 1 after its checkpoint


async def test_a_waiting_request_is_cancelled_without_ever_running(group: DistributedRunner) -> None:
    running = group.submit(LONG, streaming=True)
    await running.next()
    waiting = group.submit({"steps": 1}, request_id="twin")
    other = group.submit({"steps": 1}, request_id="twin")
    assert group.cancel("nobody") is False
    assert group.cancel("twin") is True
    for ticket in (waiting, other):
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(ticket.result(), 1)
        assert ticket.run_time is None
    assert not running.done
    running.cancel()
    await running.wait()


async def test_a_cancelled_caller_that_waits_for_its_turn_gives_up_its_place(group: DistributedRunner) -> None:
    running = group.submit(LONG)
    task = asyncio.create_task(group.invoke({"steps": 1}))
    await asyncio.sleep(0)
    assert group.status.queue_depth == 1
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert group.status.queue_depth == 0
    running.cancel()
    await running.wait()


@pytest.mark.parametrize("way", [by_ticket, by_task, by_name])
async def test_a_worker_without_step_boundaries_is_restarted(
    group: DistributedRunner, tickets: Tickets, way: Any
) -> None:
    before = group.status.restarts
    cancelling = asyncio.create_task(way(group, {**LONG, "boundaries": False}, 2))
    await asyncio.wait_for(tickets.queued.wait(), 5)
    waiting = group.submit({"steps": 3, "tag": "next"})
    async with asyncio.timeout(GRACE + 2):
        await cancelling
    packed = await asyncio.wait_for(waiting.result(), 20)
    assert codec.unpack(packed.data, packed.buffers)["tag"] == "next"
    assert group.status.restarts == before + 1
    failure = group.status.last_failure
    assert failure is not None
    assert failure.reason == "Stuck"
    assert "did not leave the request within 0.5 s" in failure.message


@pytest.mark.parametrize("rank", range(RANKS))
async def test_a_stopped_rank_is_blamed_for_a_cancel_that_nobody_follows(
    group: DistributedRunner, until: Any, rank: int
) -> None:
    """The others wait for it in a collective, so none of them leaves the request."""
    before = group.status.restarts
    doomed = group.submit(LONG, streaming=True)
    await doomed.next()
    os.kill(group.status.ranks[rank].pid or 0, signal.SIGSTOP)
    await until(group, lambda status: status.ranks[rank].state == "paused", 5)
    doomed.cancel()
    with pytest.raises(RequestCancelled):
        await asyncio.wait_for(doomed.result(), GRACE + 2)
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", 20)
    failure = group.status.last_failure
    assert failure is not None
    assert (failure.reason, failure.rank) == ("Stuck", rank)


async def test_a_timeout_is_told_at_once_even_when_the_ranks_do_not_listen(group: DistributedRunner) -> None:
    before = group.status.restarts
    doomed = group.submit({**LONG, "boundaries": False}, timeout=0.05)
    waiting = group.submit({"steps": 3})
    with pytest.raises(RequestTimeout):
        await asyncio.wait_for(doomed.result(), 1)
    assert group.status.restarts == before
    assert group.status.in_flight == 1  # the ranks still have it
    await asyncio.wait_for(waiting.result(), 20)
    assert group.status.restarts == before + 1


async def test_a_request_that_ends_within_the_grace_costs_no_restart(group: DistributedRunner) -> None:
    before = group.status.restarts
    ticket = group.submit({"steps": 20, "seconds": 0.01, "boundaries": False}, streaming=True)
    await ticket.next()
    ticket.cancel()
    with suppress(DrumlineError):  # it did all its work: the result may be told, or that it was cancelled
        await asyncio.wait_for(ticket.result(), 5)
    await asyncio.wait_for(group.invoke({"steps": 1}), 5)
    assert group.status.restarts == before


async def test_a_draining_group_refuses_and_after_its_time_cancels(group: DistributedRunner) -> None:
    """The last test: what is left for its fixture to do is nothing."""
    done, running, waiting = group.submit({"steps": 3}), group.submit(LONG), group.submit({"steps": 1})
    draining = asyncio.create_task(group.drain(0.1))
    await asyncio.sleep(0)
    assert group.status.state == "draining"
    with pytest.raises(Draining):
        await group.invoke({"steps": 1})
    await asyncio.wait_for(done.result(), 5)
    await asyncio.wait_for(draining, 5)
    for ticket in (running, waiting):
        with pytest.raises(Draining):
            await ticket.result()
    assert set(running.stopped_steps) == set(range(RANKS))
    await group.stop()


async def test_stop_cancels_the_running_request_and_refuses_the_waiting_ones(group: DistributedRunner) -> None:
    await group.start()
    running, waiting = group.submit(LONG), group.submit({"steps": 1})
    await asyncio.wait_for(group.stop(), 10)
    with pytest.raises(RequestCancelled, match="stopping"):
        await running.result()
    with pytest.raises(NotReady):
        await waiting.result()
    assert set(running.stopped_steps) == set(range(RANKS))
