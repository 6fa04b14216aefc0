"""The clients against the real server and real ranks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from drumline.client import AsyncClient, Client
from drumline.contract import RunnerSettings
from drumline.errors import (
    InvalidPayload,
    QueueFull,
    RankLost,
    RequestCancelled,
    RequestTimeout,
    WorkerError,
)
from drumline.host import build_service
from drumline.server.serve import serve

WAIT = 45.0


class Served:
    """A service on a thread of its own."""

    def __init__(self, settings: RunnerSettings) -> None:
        self.url = ""
        self._settings = settings
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(WAIT)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ended = await serve(
            build_service(self._settings),
            on_bound=lambda url: setattr(self, "url", url),
            on_ready=self._ready.set,
            stop=self._stop,
            handle_signals=False,
        )
        assert ended.error is None

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


def address_of(worker: str) -> Iterator[str]:
    settings = RunnerSettings(
        target=f"drumline.testing.workers:{worker}",
        world_size=2,
        port=0,
        device="cpu",
        drain_delay=0,
        max_queue_depth=1,
        cancel_grace=20,
    )
    served = Served(settings)
    yield served.url
    served.stop()


@pytest.fixture(scope="module")
def steps() -> Iterator[str]:
    yield from address_of("Steps")


@pytest.fixture
def fails() -> Iterator[str]:
    yield from address_of("Fails")


def test_invoke_and_stream(steps: str) -> None:
    with Client(steps) as client:
        assert client.status()["readyRanks"] == 2
        result = client.invoke({"steps": 2, "tag": "a"})
        assert (result["steps"], result["tag"]) == (2, "a")
        events = list(client.stream({"steps": 2, "tag": "b"}))
    assert [(event.type, event.id) for event in events] == [("update", 0), ("update", 1), ("result", 2)]
    assert [event.data["step"] for event in events[:2]] == [0, 1]
    assert events[2].data["tag"] == "b"


async def test_many_streams_at_once_get_their_own_events(steps: str) -> None:
    async with AsyncClient(steps, retries=100, timeout=WAIT) as client:

        async def one(tag: str) -> set[str]:
            async with client.stream({"steps": 2, "tag": tag}) as events:
                return {event.data["tag"] async for event in events}

        found = await asyncio.gather(*(one(f"t{number}") for number in range(6)))
    assert found == [{f"t{number}"} for number in range(6)]


def test_errors_are_typed(fails: str) -> None:
    with Client(fails) as client:
        with pytest.raises(WorkerError, match="exploded on purpose") as raised:
            client.invoke({"how": "raise", "rank": 1}, request_id="r-1")
        assert (raised.value.rank, raised.value.request_id) == (1, "r-1")
        assert raised.value.exception_type.endswith("WorkerExploded")
        with pytest.raises(InvalidPayload) as invalid:
            client.invoke({"rank": "one"})
        assert invalid.value.detail[0]["loc"] == ["body", "rank"]
        with pytest.raises(WorkerError, match="exploded"):
            list(client.stream({"how": "raise", "updates": 2}))
        with pytest.raises(RankLost) as lost:
            client.invoke({"how": "kill", "rank": 1})
        assert (lost.value.rank, lost.value.signal) == (1, 9)
        assert client.invoke({"tag": "again"}, timeout=WAIT)["tag"] == "again"


async def test_cancel_ends_the_request_for_its_caller(steps: str) -> None:
    async with AsyncClient(steps) as client, client.stream({"steps": 5000, "seconds": 0.02}) as events:
        assert (await anext(events)).type == "update"
        assert await client.cancel(events.request_id) is True
        with pytest.raises(RequestCancelled) as cancelled:
            async for _ in events:
                pass
        assert cancelled.value.step is not None
        assert await client.cancel(events.request_id) is False


async def test_leaving_a_stream_frees_the_ranks(steps: str) -> None:
    async with AsyncClient(steps) as client:
        async with client.stream({"steps": 5000, "seconds": 0.02}) as events:
            await anext(events)
        assert (await client.invoke({"steps": 1, "tag": "next"}, timeout=WAIT))["tag"] == "next"


async def test_a_full_queue_and_a_time_out(steps: str) -> None:
    async with AsyncClient(steps) as client:
        async with client.stream({"steps": 5000, "seconds": 0.02}) as running:
            await anext(running)
            # One place to wait: of two, one is refused at once, the other one is served after the stream.
            both = [asyncio.create_task(client.invoke({"tag": "waits"}, timeout=WAIT)) for _ in range(2)]
            (refused,), (waiting,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(QueueFull) as full:
                await refused
            assert full.value.retry_after >= 1
        assert (await waiting)["tag"] == "waits"
        with pytest.raises(RequestTimeout):
            await client.invoke({"steps": 5000, "seconds": 0.02}, timeout=0.3)
