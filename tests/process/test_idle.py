"""A server that nobody asks anything does nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import httpx2
import pytest

from drumline.server import date_header
from drumline.testing.serving import Server, running, service_for


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda: service_for("drumline.testing.served:Served", world_size=1)) as made:
        yield made


def test_no_timer_is_armed_while_nothing_happens(server: Server) -> None:
    assert server.timers() == []


def test_the_date_header_is_that_of_the_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with httpx2.Client(base_url=server.url) as client:

        def date() -> float:
            answer = client.get("/healthz")
            assert len(answer.headers.get_list("date")) == 1
            return parsedate_to_datetime(answer.headers["date"]).timestamp()

        began = int(time.time())
        assert began <= date() <= time.time()
        monkeypatch.setattr(date_header.time, "time", lambda: 1e9 + 0.7)
        assert date() == 1e9
