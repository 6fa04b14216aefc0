"""The queue of keys: dedupe, one run per key, back-off, resync."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline_operator.workqueue import Schedule, WorkQueue


def test_a_key_waits_once() -> None:
    queue = Schedule()
    for at in (5.0, 3.0, 4.0):
        queue.add("a", at)
    assert (len(queue), queue.next_due()) == (1, 3.0)
    assert queue.take(2.9) is None
    assert queue.take(3.0) == "a"
    assert queue.take(9.0) is None
    assert queue.next_due() is None


def test_a_running_key_runs_once_more() -> None:
    queue = Schedule()
    queue.add("a", 0)
    assert queue.take(0) == "a"
    queue.add("a", 1)
    queue.add("a", 2)
    assert queue.take(9) is None
    queue.done("a")
    assert queue.next_due() == 1
    assert queue.take(1) == "a"
    queue.done("a")
    assert len(queue) == 0


def test_the_earliest_comes_first() -> None:
    queue = Schedule()
    for key, at in (("b", 2), ("a", 1), ("c", 2)):
        queue.add(key, at)
    assert queue.ready(1) == 1
    assert [queue.take(2) for _ in range(4)] == ["a", "b", "c", None]


def test_back_off_doubles_and_starts_anew() -> None:
    queue = Schedule(base=1, longest=10)
    delays: list[float] = []
    queue.add("a", 0)
    for _ in range(6):
        now = sum(delays)
        assert queue.take(now) == "a"
        delays.append(queue.failed("a", now))
    assert delays == [1, 2, 4, 8, 10, 10]
    assert queue.take(1e9) == "a"
    queue.done("a")
    queue.add("a", 0)
    assert queue.take(0) == "a"
    assert queue.failed("a", 0, at_least=7) == 7


def test_news_before_its_time_does_not_lengthen_the_wait() -> None:
    """A key that is woken ten times within a moment of trouble waits no longer afterwards than one that is not."""
    queue = Schedule(base=1, longest=60)
    delays = []
    for now in (0.0, 0.1, 0.2, 0.3):
        queue.add("a", now)
        assert queue.take(now) == "a"
        delays.append(queue.failed("a", now))
    assert delays == [1, 1, 1, 1]
    assert queue.take(1.3) == "a"
    assert queue.failed("a", 1.3) == 2


def test_a_wish_during_a_failure_does_not_shorten_the_wait() -> None:
    queue = Schedule(base=5)
    queue.add("a", 0)
    assert queue.take(0) == "a"
    queue.add("a", 0)
    queue.failed("a", 0)
    assert queue.next_due() == 5


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["add", "take", "done", "failed"]), st.integers(0, 5)))
)
def test_no_key_runs_twice_and_none_is_lost(story: list[tuple[str, str, int]]) -> None:
    queue, now, running, wanted = Schedule(), 0.0, set[str](), set[str]()
    for key, what, delay in story:
        now += 1
        if what == "add":
            queue.add(key, now + delay)
            wanted.add(key)
        elif what == "take" and (taken := queue.take(now)):
            assert taken not in running
            running.add(taken)
            wanted.discard(taken)
        elif key in running and what == "done":
            running.discard(key)
            queue.done(key)
        elif key in running and what == "failed":
            running.discard(key)
            queue.failed(key, now)
            wanted.add(key)
    for key in running:
        queue.done(key)
    left = set()
    while (taken := queue.take(1e9)) is not None:
        left.add(taken)
    assert left == wanted


async def worked(queue: WorkQueue, until: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(4):
            await until()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_workers_run_keys_side_by_side_but_never_one_twice() -> None:
    together, gate, ran = asyncio.Barrier(3), asyncio.Event(), list[str]()

    async def handle(key: str) -> float | None:
        ran.append(key)
        await together.wait()
        await gate.wait()
        return -1

    queue = WorkQueue(handle, workers=2)
    for key in ("a", "a", "b", "c"):
        queue.add(key)

    async def until() -> None:
        await together.wait()
        assert sorted(ran) == ["a", "b"]
        queue.add("a")
        gate.set()
        await together.wait()
        assert sorted(ran) == ["a", "a", "b", "c"]

    await worked(queue, until)


@pytest.mark.parametrize("asked", [None, 0.02])
async def test_keys_come_again(asked: float | None) -> None:
    runs = asyncio.Queue[str]()

    async def handle(key: str) -> float | None:
        runs.put_nowait(key)
        return asked

    queue = WorkQueue(handle, resync=0.01 if asked is None else 100)
    queue.add("a")

    async def until() -> None:
        for _ in range(3):
            assert await runs.get() == "a"

    await worked(queue, until)


async def test_a_failed_key_is_tried_again_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    runs = asyncio.Queue[str]()

    async def handle(key: str) -> float | None:
        runs.put_nowait(key)
        if key == "bad":
            raise OSError("no answer")
        return -1

    queue = WorkQueue(handle, workers=1, retry_after=lambda error: 0.3)
    queue.add("bad")
    queue.add("good")

    async def until() -> None:
        assert [await runs.get() for _ in range(3)] == ["bad", "good", "bad"]

    await worked(queue, until)
    assert "bad: OSError: no answer; again in 0.30 s" in caplog.text


async def test_a_key_that_is_gone_is_forgotten() -> None:
    ran = asyncio.Event()

    async def handle(key: str) -> float | None:
        ran.set()
        return -1

    queue = WorkQueue(handle)
    queue.add("a")
    await worked(queue, ran.wait)
    assert len(queue.schedule) == 0


async def test_a_run_that_is_cut_off_is_done_again_when_work_begins_anew() -> None:
    began = asyncio.Event()
    runs: list[str] = []

    async def handle(key: str) -> None:
        runs.append(key)
        began.set()
        if len(runs) == 1:
            await asyncio.Event().wait()

    queue = WorkQueue(handle)
    queue.add("a")
    for _ in range(2):
        task = asyncio.create_task(queue.run())
        await began.wait()
        began.clear()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert runs == ["a", "a"]
