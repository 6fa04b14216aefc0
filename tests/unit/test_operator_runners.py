"""What is known of runners: a new leader waits for their first answer rather than take it for silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from drumline_operator.runners import Runners

READY = {"state": "ready", "worldSize": 2, "readyRanks": 2, "restarts": 0, "lastFailure": None}
POD = {
    "status": {
        "podIP": "10.0.0.1",
        "containerStatuses": [{"name": "worker", "state": {"running": {}}}],
    },
    "spec": {"containers": [{"name": "worker", "ports": [{"name": "http", "containerPort": 8080}]}]},
}


class Asker:
    """Answers when it is told to."""

    def __init__(self, answer: Mapping[str, Any] | None) -> None:
        self.answer, self.asked, self.may = answer, asyncio.Event(), asyncio.Event()

    async def runner_news(self, address: str, port: int, since: int | None) -> Mapping[str, Any] | None:
        assert (address, port) == ("10.0.0.1", 8080)
        if since is not None:
            await asyncio.get_running_loop().create_future()  # no news
        self.asked.set()
        await self.may.wait()
        return self.answer


@asynccontextmanager
async def running(asker: Asker, told: list[str] | None = None) -> AsyncIterator[Runners]:
    runners = Runners(asker, [].append if told is None else told.append)
    task = asyncio.create_task(runners.run())
    await asyncio.sleep(0)
    yield runners
    task.cancel()
    await asyncio.wait([task])


async def test_the_first_answer_is_waited_for() -> None:
    asker = Asker({**READY, "version": 1})
    async with running(asker) as runners:
        runners.pod("a", POD)
        said = asyncio.create_task(runners.said("a"))
        await asker.asked.wait()
        assert not said.done()
        asker.may.set()
        assert await said == READY
        assert await runners.said("a") == READY
        assert await runners.said("unknown") is None


async def test_who_waits_for_the_first_answer_is_not_told_of_it_once_more() -> None:
    told: list[str] = []
    asker = Asker({**READY, "version": 1})
    asker.may.set()
    async with running(asker, told) as runners:
        runners.pod("a", POD)
        assert await runners.said("a") == READY
        runners.pod("b", POD)
        await asyncio.sleep(0)
        async with asyncio.timeout(4):
            while not told:  # noqa: ASYNC110 - nobody waits for this answer
                await asyncio.sleep(0)
    assert told == ["b"]


async def test_silence_is_an_answer() -> None:
    asker = Asker(None)
    asker.may.set()
    async with running(asker) as runners:
        runners.pod("a", POD)
        assert await runners.said("a") is None


async def test_nobody_waits_for_a_pod_that_went() -> None:
    async with running(Asker({**READY, "version": 1})) as runners:
        runners.pod("a", POD)
        said = asyncio.create_task(runners.said("a"))
        await asyncio.sleep(0)
        runners.pod("a", None)
        assert await said is None


async def test_nobody_waits_for_a_leader_that_gave_up() -> None:
    async with running(Asker({**READY, "version": 1})) as runners:
        runners.pod("a", POD)
        said = asyncio.create_task(runners.said("a"))
        await asyncio.sleep(0)
    assert await said is None


async def test_a_pod_that_has_become_ready_is_asked_at_once() -> None:
    """However soon after the last answer: what was said before is not what serves now."""
    asker = Asker({**READY, "state": "starting", "readyRanks": 1, "version": 1})
    asker.may.set()
    async with running(asker) as runners:
        runners.pod("a", POD)
        assert (await runners.said("a") or {})["readyRanks"] == 1
        asker.answer = {**READY, "version": 2}
        runners.pod("a", POD)
        assert (await runners.said("a") or {})["readyRanks"] == 1, "nothing is new about the pod"
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        runners.pod("a", {**POD, "status": {**POD["status"], **ready}})
        assert await runners.said("a") == READY
