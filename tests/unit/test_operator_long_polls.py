"""Long polls to runners: told at once, asked again no sooner than needed, left alone when they do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from drumline_operator.runner_client import RunnerClient
from drumline_operator.runners import Runners, place_of


def pod(port: int, *, address: str = "127.0.0.1", running: bool = True) -> dict[str, Any]:
    state = {"running": {}} if running else {"waiting": {"reason": "ContainerCreating"}}
    return {
        "spec": {"containers": [{"name": "worker", "ports": [{"name": "http", "containerPort": port}]}]},
        "status": {"podIP": address, "containerStatuses": [{"name": "worker", "state": state}]},
    }


class Runner:
    """A runner's ``/readyz``, as `drumline serve` has it."""

    def __init__(self) -> None:
        self.version, self.fields = 1, {"state": "starting", "worldSize": 2, "readyRanks": 0, "restarts": 0}
        self.asked: list[int | None] = []
        self._changed = asyncio.Event()

    def change(self, **fields: Any) -> None:
        self.version += 1
        self.fields |= fields
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def readyz(self, request: web.Request) -> web.Response:
        since = request.query.get("since")
        self.asked.append(None if since is None else int(since))
        if self.asked[-1] == self.version:
            await self._changed.wait()
        ready = self.fields["state"] == "ready"
        return web.json_response({**self.fields, "version": self.version}, status=200 if ready else 503)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        app = web.Application()
        app.add_routes([web.get("/readyz", self.readyz)])
        served = web.AppRunner(app)
        await served.setup()
        await web.TCPSite(served, "127.0.0.1", 0).start()
        try:
            yield served.addresses[0][1]
        finally:
            self.change()  # whoever waits is answered
            await served.cleanup()


class News(asyncio.Queue[str]):
    """What the operator is told of."""

    async def next(self) -> str:
        async with asyncio.timeout(4):
            return await self.get()


@asynccontextmanager
async def asking(shortest: float = 0.01) -> AsyncIterator[tuple[Runners, News]]:
    news = News()
    async with RunnerClient() as client:
        runners = Runners(client, news.put_nowait, shortest)
        task = asyncio.create_task(runners.run())
        await asyncio.sleep(0)
        try:
            yield runners, news
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_news_are_told_at_once_and_only_news() -> None:
    runner = Runner()
    async with runner.serving() as port, asking() as (runners, news):
        runners.pod("u", pod(port))
        assert await news.next() == "u"
        runner.change(step=7)  # nothing that is shown
        runner.change(state="ready", readyRanks=2)
        assert await news.next() == "u"
        said = await runners.said("u")
        assert said is not None
        assert (said["state"], said["readyRanks"], "step" in said) == ("ready", 2, False)
        assert news.empty()
        assert runner.asked[0] is None
        runner.change(state="restarting", restarts=1, lastFailure={"rank": 1, "reason": "Killed"})
        await news.next()
        runners.pod("u", None)
        assert await runners.said("u") is None


class Hasty:
    """Answers at once, whatever it is asked."""

    def __init__(self) -> None:
        self.asks: asyncio.Queue[int | None] = asyncio.Queue()

    async def runner_news(self, address: str, port: int, since: int | None) -> dict[str, Any]:
        self.asks.put_nowait(since)
        return {"state": "ready", "version": 1}


async def test_a_runner_that_does_not_wait_is_not_asked_all_the_time() -> None:
    hasty = Hasty()
    runners = Runners(hasty, lambda uid: None, shortest=0.5)
    task = asyncio.create_task(runners.run())
    await asyncio.sleep(0)
    runners.pod("u", pod(1))
    async with asyncio.timeout(4):
        assert [await hasty.asks.get() for _ in range(2)] == [None, 1]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.8):
            await hasty.asks.get()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_runner_that_goes_away_is_forgotten() -> None:
    runner = Runner()
    async with asking() as (runners, news):
        async with runner.serving() as port:
            runners.pod("u", pod(port))
            await news.next()
        await news.next()
        assert await runners.said("u") is None


async def test_a_pod_that_moves_is_asked_at_its_new_place() -> None:
    one, two = Runner(), Runner()
    two.fields["readyRanks"] = 1
    async with one.serving() as first, two.serving() as second, asking() as (runners, news):
        runners.pod("u", pod(first))
        await news.next()
        runners.pod("u", pod(first))
        assert await runners.said("u") is not None
        runners.pod("u", pod(second))
        said = await runners.said("u")
        assert said is not None
        assert said["readyRanks"] == 1
        assert len(one.asked) <= 2


@pytest.mark.parametrize(
    "changed",
    [
        pod(1, running=False),
        pod(1, address=""),
        {},
        {"status": pod(1)["status"], "spec": {"containers": [{"name": "x"}]}},
    ],
)
def test_pods_that_cannot_be_asked(changed: dict[str, Any]) -> None:
    assert place_of(changed) is None
    assert place_of(pod(8080, address="10.0.0.1")) == ("10.0.0.1", 8080)
