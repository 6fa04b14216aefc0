"""Ranks that die or hang while clients wait: what they are told, and that all goes on afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from drumline.errors import NotReady, SetupFailed
from drumline.problems import TYPE_PREFIX
from drumline.testing.answers import events_of, metric_of, problem_of
from drumline.testing.serving import Server, running, service_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGET = "drumline.testing.served:Served"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    with running(lambda: service_for(TARGET, hang_timeout=1, cancel_grace=0.5)) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """These tests restart the group that the module shares."""


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=server.url, timeout=30, limits=limits) as made:
        await ready(made)
        yield made
        await ready(made)


async def ready(client: httpx2.AsyncClient) -> dict[str, Any]:
    """Wait, by long polls, until the group serves."""
    status: dict[str, Any] = (await client.get("/status")).json()
    while status["state"] != "ready":
        status = (await client.get("/status", params={"since": status["version"]})).json()
    return status


async def test_rank_lost_then_served_again(client: httpx2.AsyncClient) -> None:
    before = await ready(client)
    body = problem_of(await client.post("/", json={"prompt": "x", "how": "kill", "rank": 1}), "rank-lost")
    assert (body["rank"], body["signal"]) == (1, 9)
    answer = await client.post("/", json={"prompt": "after"})
    assert answer.json()["prompt"] == "after"
    after = await ready(client)
    assert after["restarts"] == before["restarts"] + 1
    assert (after["lastFailure"]["rank"], after["lastFailure"]["signal"]) == (1, 9)
    metrics = (await client.get("/metrics")).text
    assert metric_of(metrics, 'drumline_group_restarts_total{reason="Killed"}') >= 1
    assert metric_of(metrics, 'drumline_rank_up{rank="1"}') == 1


async def test_rank_that_exits_tells_its_code(client: httpx2.AsyncClient) -> None:
    body = problem_of(await client.post("/", json={"prompt": "x", "how": "_exit"}), "rank-lost")
    assert (body["rank"], body["exit_code"]) == (0, 9)
    assert "signal" not in body


async def test_rank_hung(client: httpx2.AsyncClient) -> None:
    body = problem_of(await client.post("/", json={"prompt": "x", "steps": 3, "how": "hang", "rank": 1}), "rank-hung")
    assert body["rank"] == 1
    assert "stacks" not in body


async def test_stream_of_a_killed_rank_ends_with_its_error(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/stream", json={"prompt": "x", "steps": 2, "how": "kill", "rank": 0})
    assert answer.status_code == 200
    name, number, problem = events_of(answer.text)[-1]
    assert (name, problem["type"], problem["rank"]) == ("error", TYPE_PREFIX + "rank-lost", 0)
    assert number == 2


async def test_long_poll_wakes_when_a_rank_dies(client: httpx2.AsyncClient) -> None:
    status = await ready(client)
    poll = asyncio.create_task(client.get("/status", params={"since": status["version"]}))
    problem_of(await client.post("/", json={"prompt": "x", "how": "kill"}), "rank-lost")
    assert (await asyncio.wait_for(poll, 5)).json()["version"] != status["version"]


async def test_unready_while_restarting_but_alive_and_requests_wait(client: httpx2.AsyncClient) -> None:
    problem_of(await client.post("/", json={"prompt": "x", "how": "kill"}), "rank-lost")
    waits = asyncio.create_task(client.post("/", json={"prompt": "waits"}))
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["state"]) == (503, "restarting")
    assert (await client.get("/healthz")).status_code == 200
    assert (await waits).json()["prompt"] == "waits"


class TestOwnServer:
    """Servers that do not survive their test."""

    async def test_not_ready_until_the_ranks_are(self) -> None:
        with running(lambda: service_for(TARGET), until_ready=False) as server:
            async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
                assert (await client.get("/healthz")).status_code == 200
                for path in ("/readyz", "/startupz"):
                    answer = await client.get(path)
                    assert (answer.status_code, answer.json()["state"]) == (503, "starting")
                for path in ("/", "/stream"):
                    problem_of(await client.post(path, json={"prompt": "x"}), "not-ready")
                status = await ready(client)
                assert status["readyRanks"] == 2
                assert (await client.get("/startupz")).status_code == 200
                assert (await client.post("/", json={"prompt": "x"})).status_code == 200
            assert server.stop().error is None

    async def test_setup_that_fails_ends_the_server_with_that_error(self) -> None:
        with running(lambda: service_for(TARGET, setup_args={"fail_rank": 1}), until_ready=False) as server:
            error = server.wait().error
        assert isinstance(error, SetupFailed)
        assert error.rank == 1
        assert "exploded on purpose" in error.message

    async def test_stop_while_starting(self) -> None:
        with running(lambda: service_for(TARGET), until_ready=False) as server:
            ended = server.stop()
        assert (ended.error, ended.forced) == (None, False)

    async def test_restart_budget_that_is_used_up_ends_the_server(self) -> None:
        settings = {"restart": {"max_restarts": 0}}
        with running(lambda: service_for(TARGET, **settings)) as server:
            async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
                problem_of(await client.post("/", json={"prompt": "x", "how": "kill", "rank": 1}), "rank-lost")
            error = server.wait().error
        assert isinstance(error, NotReady)
        assert "rank 1" in str(error)
