"""Clients that leave while others of their requests wait on the same connection: nothing goes on running for them."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

import drumline
from drumline.contract import RunnerSettings
from drumline.host import service_of_app
from drumline.runner.observer import Observer
from drumline.runner.ticket import Ticket
from drumline.server import limits
from drumline.server.service import Service
from drumline.testing.serving import Server, running, service_for
from drumline.testing.workers import Steps

#: Far more than any wait here may take, and far less than the requests would run for.
WAIT = 30.0
ENDLESS = {"steps": 1_000_000, "seconds": 0.01}


class Story(Observer):
    """What becomes of requests, in order."""

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def request_started(self, ticket: Ticket) -> None:
        self.told.put((ticket.request_id, "started"))

    def request_finished(self, ticket: Ticket) -> None:
        self.told.put((ticket.request_id, ticket.outcome))


class Stepping(drumline.App):
    """One endpoint, one runner."""

    async def setup(self) -> None:
        self.runner = drumline.DistributedRunner(Steps, 1)
        await self.runner.start()

    @drumline.endpoint("/")
    async def invoke(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"tag": (await self.runner.invoke(payload))["tag"]}


def app() -> Service:
    return service_of_app(Stepping, RunnerSettings(port=0, device="cpu", drain_delay=0))


def worker() -> Service:
    return service_for("drumline.testing.workers:Steps", world_size=1)


@pytest.fixture(autouse=True)
def nothing_left(nothing_left_by_module: None) -> None:
    """The module shares servers with their worker threads: it is looked at as a whole."""


@pytest.fixture(scope="module", params=[worker, app])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Server, Story]]:
    story, make = Story(), request.param

    def observed() -> Service:
        service: Service = make()
        service.observers.append(story)
        return service

    with running(observed) as server:
        yield server, story


@pytest.fixture
def leaver(served: tuple[Server, Story]) -> Iterator[tuple[Callable[[bytes], None], Callable[[], None]]]:
    """``send(data)`` returns when the server has read ``data``; ``leave()`` closes the connection."""
    server, _ = served
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as connection:

        def send(data: bytes) -> None:
            connection.sendall(data)
            with httpx2.Client(base_url=server.url, timeout=WAIT) as later:  # whoever connects later is read later
                assert later.get("/healthz").status_code == 200

        yield send, connection.close


def call(name: str, **payload: object) -> bytes:
    body = json.dumps(payload).encode()
    head = f"POST / HTTP/1.1\r\nhost: x\r\nx-request-id: {name}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("together", [True, False], ids=["one segment", "one after the other"])
def test_client_that_leaves_with_requests_in_a_row(served, leaver, together):
    (server, story), (send, leave) = served, leaver
    parts = [call("first", **ENDLESS), call("second", **ENDLESS)]
    send(b"".join(parts) if together else parts[0])
    assert story.told.get(timeout=WAIT) == ("first", "started")
    if not together:
        send(parts[1])
    leave()
    assert story.told.get(timeout=WAIT) == ("first", "cancelled")
    answer = httpx2.post(server.url, json={"steps": 1}, headers={"x-request-id": "next"}, timeout=WAIT)
    assert answer.status_code == 200
    # The second was never begun.
    assert [story.told.get(timeout=WAIT) for _ in range(2)] == [("next", "started"), ("next", "ok")]
    assert story.told.empty()


def test_requests_that_wait_with_more_bytes_than_are_read_ahead_are_answered(served, leaver, monkeypatch):
    """Beyond that reading waits for the answers, and goes on with them."""
    monkeypatch.setattr(limits, "MAX_WAITING_BYTES", 100)
    (server, story), (send, leave) = served, leaver
    send(call("first", **ENDLESS))
    assert story.told.get(timeout=WAIT) == ("first", "started")
    send(call("second", steps=1, tag="x" * 100))
    httpx2.post(f"{server.url}/requests/first/cancel", timeout=WAIT).raise_for_status()
    told = [story.told.get(timeout=WAIT) for _ in range(3)]
    assert told == [("first", "cancelled"), ("second", "started"), ("second", "ok")]
    leave()
