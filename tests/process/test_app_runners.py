"""Apps with runners behind the real server: what an endpoint may rely on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from fastapi.responses import StreamingResponse

import drumline
from drumline import context
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, SetupFailed
from drumline.host import service_of_app
from drumline.server.serve import Ended, serve
from drumline.testing.workers import Facts, Fails, Steps

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = RunnerSettings(port=0, device="cpu", any_id=True, drain_delay=0, drain_timeout=10, max_queue_depth=5)


@pytest.fixture(autouse=True)
def nothing_left(nothing_left_by_module: None) -> None:
    """The module shares a server with its connections and worker threads: it is looked at as a whole."""


class Studio(drumline.App):
    """Three runners, and no teardown of their own."""

    num_gpus = 2

    async def setup(self) -> None:
        self.runners = {cls.__name__: drumline.DistributedRunner(cls, self.num_gpus) for cls in (Facts, Fails, Steps)}
        await asyncio.gather(*(runner.start() for runner in self.runners.values()))
        assert {runner.max_queue_depth for runner in self.runners.values()} == {5}

    @drumline.endpoint("/invoke/{name}")
    async def invoke(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        result = await self.runners[name].invoke(payload)
        if "state" in result:
            result["state"] = result["state"].tolist()
        return result

    @drumline.endpoint("/stream/{name}")
    async def stream(self, name: str, payload: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(
            self.runners[name].stream(payload, as_text_events=True), media_type="text/event-stream"
        )


@contextlib.asynccontextmanager
async def served(cls: type[drumline.App]) -> AsyncIterator[tuple[str, asyncio.Task[Ended]]]:
    bound, ready, stop = asyncio.get_running_loop().create_future(), asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(
        serve(
            service_of_app(cls, SETTINGS),
            on_bound=bound.set_result,
            on_ready=ready.set,
            stop=stop,
            handle_signals=False,
        )
    )
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait([task, waiting], timeout=50, return_when=asyncio.FIRST_COMPLETED)
        yield await bound, task
    finally:
        waiting.cancel()
        stop.set()
        ended = await task
        assert ended.signal is None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with served(Studio) as (url, task):
        assert not task.done(), task.result()
        async with httpx2.AsyncClient(base_url=url, timeout=30) as made:
            yield made


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


async def test_a_request_keeps_its_id_on_the_ranks(client):
    answer = await client.post("/invoke/Facts", json={}, headers={"X-Request-Id": "mine-7", "X-Fal-Endpoint": "abc"})
    ranks = answer.json()["ranks"]
    assert [rank["request_id"] for rank in ranks] == ["mine-7"] * 2
    assert ranks[0]["headers"]["x-fal-endpoint"] == "abc"
    assert {rank["device"] for rank in ranks} == {"cpu"}
    assert answer.headers["x-request-id"] == "mine-7"


async def test_status_shows_the_runners(client):
    status = (await client.get("/status")).json()
    assert (status["state"], status["worldSize"], status["readyRanks"]) == ("ready", 6, 6)
    assert (await client.get("/readyz")).status_code == 200


async def test_a_stream(client):
    answer = await client.post("/anybody/anything/stream/Steps", json={"steps": 3, "tag": "t"})
    *updates, last = events(answer.text)
    assert updates == [("update", {"step": step, "tag": "t", "rank": 0}) for step in range(3)]
    assert (last[0], last[1]["tag"]) == ("result", "t")


@pytest.mark.parametrize("rank", [0, 1])
async def test_an_error_of_a_rank_is_a_problem(client, rank):
    answer = await client.post("/invoke/Fails", json={"how": "raise", "rank": rank})
    problem = answer.json()
    assert (answer.status_code, problem["type"].rpartition("/")[2], problem["rank"]) == (500, "worker-error", rank)
    assert (await client.post("/invoke/Fails", json={"tag": "next"})).json() == {"ok": True, "tag": "next"}
    streamed = await client.post("/stream/Fails", json={"how": "raise", "rank": rank, "updates": 2})
    *kinds, last = [kind for kind, _ in events(streamed.text)]
    assert last == "error"
    # Rank 0 sends its updates before it raises; those of a peer that fails first may not be on their way yet.
    assert kinds == ["update"] * 2 if rank == 0 else set(kinds) <= {"update"}


@pytest.mark.parametrize(
    ("payload", "loc"),
    [
        ({"steps": "many"}, "steps"),
        ({"stpes": 1}, "stpes"),
        ({"streaming": True}, "streaming"),
        ({"self": 1}, "self"),
        ({"collective": None}, "collective"),
    ],
)
async def test_a_payload_that_does_not_fit_the_worker(client, payload, loc):
    answer = await client.post("/invoke/Steps", json=payload)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["body", loc]
    (event,) = events((await client.post("/stream/Steps", json=payload)).text)
    assert event[0] == "error"
    assert (await client.post("/invoke/Steps", json={"steps": 1})).status_code == 200


async def test_a_client_that_goes_away_cancels_its_request(client):
    with pytest.raises(httpx2.ReadTimeout):
        await client.post("/invoke/Steps", json={"steps": 100000, "seconds": 0.01}, timeout=0.5)
    async with asyncio.timeout(20):
        answer = await client.post("/invoke/Steps", json={"steps": 2, "tag": "next"})
    assert answer.json()["tag"] == "next"


async def test_runners_are_stopped_without_a_teardown():
    class Careless(drumline.App):
        async def setup(self) -> None:
            self.runner = drumline.DistributedRunner("drumline.testing.workers:Echo", 1)
            await self.runner.start()

    before = set(context.runners)
    async with served(Careless) as (_, task):
        assert not task.done()
        (mine,) = set(context.runners) - before
    assert task.result().error is None
    assert set(context.runners) <= before
    assert not mine.is_alive()


async def test_the_error_of_a_ranks_setup_is_the_apps():
    class Unlucky(drumline.App):
        async def setup(self) -> None:
            self.runner = drumline.DistributedRunner(Fails, 2)
            await self.runner.start(fail_rank=1, how="raise")

    async with served(Unlucky) as (_, task):
        error = (await asyncio.wait_for(task, 30)).error
    assert isinstance(error, SetupFailed)
    assert error.rank == 1
    assert "WorkerExploded" in error.exception_type


async def test_a_worker_class_that_ranks_cannot_find():
    class Local(drumline.DistributedWorker):
        """Lives in a function."""

    class Lost(drumline.App):
        async def setup(self) -> None:
            self.runner = drumline.DistributedRunner(Local, 1)

    async with served(Lost) as (_, task):
        error = (await asyncio.wait_for(task, 30)).error
    assert isinstance(error, ConfigurationError)
    assert "move the class to the module level of a file" in str(error)
