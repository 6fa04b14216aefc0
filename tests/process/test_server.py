"""The server with real ranks over a real socket: every row of the contract's tables."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from drumline.problems import TYPE_PREFIX
from drumline.testing.answers import events_of, metric_of, problem_of
from drumline.testing.serving import Server, running, service_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGET = "drumline.testing.served:Served"
LONG = {"prompt": "long", "steps": 2000, "seconds": 0.02}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    settings = {"max_queue_depth": 3, "max_body_bytes": 1 << 20, "stream_keepalive": 0.2, "revision": "r9"}
    with running(lambda: service_for(TARGET, **settings)) as made:
        # The first large result starts a thread that stays.
        httpx2.post(
            made.url, json={"prompt": "x", "mode": "large", "result_bytes": 4 << 20}, timeout=30
        ).raise_for_status()
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=server.url, timeout=30, limits=limits) as made:
        yield made
        await ready(made)


async def ready(client: httpx2.AsyncClient) -> dict[str, Any]:
    """Wait, by long polls, until the group serves and nothing runs."""
    status = (await client.get("/status")).json()
    while status["state"] != "ready":
        status = (await client.get("/status", params={"since": status["version"]})).json()
    return status


@asynccontextmanager
async def busy(
    client: httpx2.AsyncClient, name: str = "busy", **payload: Any
) -> AsyncIterator[asyncio.Task[httpx2.Response]]:
    """The ranks run a long request named ``name`` inside of the block; it is cancelled at the end."""
    await ready(client)
    task = asyncio.create_task(client.post("/", json=LONG | payload, headers={"X-Request-Id": name}))
    await until(client, inFlight=1)
    yield task
    if not task.done():
        await client.post(f"/requests/{name}/cancel")
        await task


async def until(client: httpx2.AsyncClient, **wanted: Any) -> dict[str, Any]:
    """Wait until the status says ``wanted``."""
    while True:
        status: dict[str, Any] = (await client.get("/status")).json()
        if wanted.items() <= status.items():
            return status


# -- invoke


@pytest.mark.parametrize("path", ["/", "/default/app", "/default/app/"])
async def test_invoke(client: httpx2.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={"prompt": "a cat", "count": 2})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"prompt": "a cat", "count": 2, "streaming": False}
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_request_id_is_taken_over_when_sane(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/", json={"prompt": "x"}, headers={"X-Request-Id": "mine.1-2_3"})
    assert answer.headers["x-request-id"] == "mine.1-2_3"
    answer = await client.post("/", json={"prompt": "x"}, headers={"X-Request-Id": "not sane!"})
    assert answer.headers["x-request-id"] != "not sane!"
    for path in ("/healthz", "/status", "/metrics", "/openapi.json", "/docs", "/nothing"):
        assert (await client.get(path, headers={"X-Request-Id": "g1"})).headers["x-request-id"] == "g1"


async def test_what_curl_sends(client: httpx2.AsyncClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await client.post("/", content=b'{"prompt": "x"}', headers=headers)
    assert answer.json()["prompt"] == "x"


async def test_image_becomes_a_data_uri(client: httpx2.AsyncClient) -> None:
    image = (await client.post("/", json={"prompt": "x", "mode": "image"})).json()["image"]
    assert image["url"].startswith("data:image/jpeg;base64,")
    assert (image["content_type"], image["width"], image["height"]) == ("image/jpeg", 8, 6)


async def test_large_result(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/", json={"prompt": "x", "mode": "large", "result_bytes": 30 << 20})
    assert len(answer.json()["text"]) == 30 << 20


# -- problems


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"1", b"null", b'{"a": NaN}', b"\xff", b"{}x", b" " * 5, b"[" * 100_000]
)
@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_400(client: httpx2.AsyncClient, body: bytes, path: str) -> None:
    answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
    problem_of(answer, "invalid-json")


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_413(client: httpx2.AsyncClient, path: str) -> None:
    large = b'{"prompt": "' + b"x" * (8 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    problem_of(await client.post(path, content=large, headers=headers), "payload-too-large")

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(large), 1 << 16):
            yield large[begin : begin + (1 << 16)]

    problem_of(await client.post(path, content=chunks(), headers=headers), "payload-too-large")


async def test_415(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in problem_of(answer, "unsupported-media-type")["detail"]


async def test_404_and_405(client: httpx2.AsyncClient) -> None:
    assert "default/app" in problem_of(await client.post("/other/app", json={}), "not-found")["detail"]
    problem_of(await client.get("/nothing"), "not-found")
    problem_of(await client.post("/requests/nobody/cancel"), "not-found")
    for method, path, allowed in (("GET", "/", "POST"), ("PUT", "/stream", "POST"), ("POST", "/status", "GET")):
        answer = await client.request(method, path)
        problem_of(answer, "method-not-allowed")
        assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_422(client: httpx2.AsyncClient, path: str) -> None:
    body = problem_of(await client.post(path, json={"count": 9, "promt": "x", "self": 1}), "validation-error")
    assert {tuple(item["loc"]) for item in body["detail"]} == {("body", "self")}
    body = problem_of(await client.post(path, json={"count": 9, "promt": "x"}), "validation-error")
    assert {tuple(item["loc"]): item["type"] for item in body["detail"]} == {
        ("body", "prompt"): "missing",
        ("body", "count"): "less_than_equal",
        ("body", "promt"): "extra_forbidden",
    }
    assert "prompt" in body["title"]
    body = problem_of(await client.get("/status", params={"since": "soon"}), "validation-error")
    assert body["detail"][0]["loc"] == ["query", "since"]


async def test_429_499_and_cancel(client: httpx2.AsyncClient) -> None:
    async with busy(client, "first") as first:
        queued = []
        for number in range(3):
            request = client.post("/", json={"prompt": "x"}, headers={"X-Request-Id": f"queued-{number}"})
            queued.append(asyncio.create_task(request))
        await until(client, queueDepth=3)
        for path in ("/", "/stream"):
            problem_of(await client.post(path, json={"prompt": "one too many"}), "queue-full")
        cancelled = await client.post("/requests/queued-1/cancel")
        assert (cancelled.status_code, cancelled.json()["request_id"]) == (202, "queued-1")
        problem_of(await queued[1], "cancelled")
        assert (await client.post("/default/app/requests/first/cancel")).status_code == 202
        assert problem_of(await first, "cancelled")["step"] > 0
        for number in (0, 2):
            assert (await queued[number]).status_code == 200


async def test_500_worker_error(client: httpx2.AsyncClient) -> None:
    body = problem_of(await client.post("/", json={"prompt": "x", "how": "raise", "rank": 1}), "worker-error")
    assert body["rank"] == 1
    assert body["exception_type"].endswith("WorkerExploded")
    assert "exploded on purpose" in body["detail"]


async def test_500_encoding_error(client: httpx2.AsyncClient) -> None:
    body = problem_of(await client.post("/", json={"prompt": "x", "mode": "nan"}), "encoding-error")
    assert "value[1]" in body["detail"]


async def test_504_request_timeout(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/", json=LONG, headers={"X-Request-Timeout": "0.2"})
    problem_of(answer, "request-timeout")


async def test_504_queue_timeout(client: httpx2.AsyncClient) -> None:
    async with busy(client):
        answer = await client.post("/", json={"prompt": "x"}, headers={"X-Fal-Request-Timeout": "0.1"})
        problem_of(answer, "queue-timeout")


# -- streams


async def test_stream(client: httpx2.AsyncClient) -> None:
    for path in ("/stream", "/default/app/stream"):
        answer = await client.post(path, json={"prompt": "x", "steps": 3})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert [event[2].get("step") for event in events_of(answer.text)[:-1]] == [0, 1, 2]
        assert events_of(answer.text)[-1] == ("result", 3, {"prompt": "x", "count": 1, "streaming": True})


async def test_stream_pings_in_silence(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/stream", json={"prompt": "x", "steps": 1, "seconds": 0.9})
    assert answer.text.count(": ping\n\n") >= 3
    assert len(events_of(answer.text)) == 2


async def test_stream_error_is_the_last_event(client: httpx2.AsyncClient) -> None:
    headers = {"X-Request-Id": "s1"}
    answer = await client.post("/stream", json={"prompt": "x", "steps": 2, "how": "raise"}, headers=headers)
    assert answer.status_code == 200
    name, number, problem = events_of(answer.text)[-1]
    assert (name, number, problem["type"]) == ("error", 2, TYPE_PREFIX + "worker-error")
    assert problem["request_id"] == "s1"
    assert "exploded on purpose" in problem["error"]


async def test_stream_cancelled(client: httpx2.AsyncClient) -> None:
    async with client.stream("POST", "/stream", json=LONG, headers={"X-Request-Id": "s2"}) as answer:
        text = ""
        cancelled = False
        async for chunk in answer.aiter_text():
            text += chunk
            if not cancelled and "event: update" in text:
                cancelled = (await client.post("/requests/s2/cancel")).status_code == 202
    assert events_of(text)[-1][2]["type"] == TYPE_PREFIX + "cancelled"


# -- clients that go away or are slow


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_client_that_goes_away_cancels(server: Server, client: httpx2.AsyncClient, path: str) -> None:
    before = metric_of((await client.get("/metrics")).text, 'drumline_requests_total{outcome="cancelled"}')
    await ready(client)
    writer = await raw_call(server, path, LONG)
    await until(client, inFlight=1)
    writer.close()
    answer = await asyncio.wait_for(client.post("/", json={"prompt": "next"}), 10)
    assert answer.json()["prompt"] == "next"
    after = metric_of((await client.get("/metrics")).text, 'drumline_requests_total{outcome="cancelled"}')
    assert after == before + 1


async def test_slow_reader_holds_up_nobody(server: Server, client: httpx2.AsyncClient) -> None:
    writer = await raw_call(server, "/stream", {"prompt": "x", "steps": 200, "update_bytes": 100_000})
    answer = await asyncio.wait_for(client.post("/", json={"prompt": "next"}), 20)
    assert answer.json()["prompt"] == "next"
    reader = writer.test_reader  # type: ignore[attr-defined]
    text = (await reader.readuntil(b"0\r\n\r\n")).decode()
    assert text.count("event: update") == 200
    assert text.count("event: result") == 1
    writer.close()


async def raw_call(server: Server, path: str, payload: Any) -> asyncio.StreamWriter:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=64 << 20)
    body = json.dumps(payload).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    writer.test_reader = reader  # type: ignore[attr-defined]
    return writer


# -- the other routes


async def test_status(client: httpx2.AsyncClient) -> None:
    status = await ready(client)
    assert set(status) == {
        *("state", "version", "worldSize", "readyRanks", "ranks", "restarts", "lastFailure", "queueDepth", "inFlight"),
        "revision",
    }
    assert (status["worldSize"], status["readyRanks"], status["revision"]) == (2, 2, "r9")
    assert [set(rank) for rank in status["ranks"]] == [{"rank", "pid", "state", "device", "step", "rssBytes"}] * 2
    for path in ("/readyz", "/startupz"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["state"]) == (200, "ready")


async def test_metrics(client: httpx2.AsyncClient) -> None:
    assert (await client.post("/stream", json={"prompt": "x", "steps": 1})).status_code == 200
    problem_of(await client.post("/", json={}), "validation-error")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    names = set(re.findall(r"^# TYPE (\S+) (\S+)$", answer.text, re.MULTILINE))
    assert names == {
        ("drumline_requests_total", "counter"),
        ("drumline_requests_in_flight", "gauge"),
        ("drumline_queue_depth", "gauge"),
        ("drumline_queue_wait_seconds", "histogram"),
        ("drumline_request_duration_seconds", "histogram"),
        ("drumline_time_to_first_event_seconds", "histogram"),
        ("drumline_rank_up", "gauge"),
        ("drumline_group_restarts_total", "counter"),
        ("drumline_setup_seconds", "gauge"),
    }
    assert metric_of(answer.text, 'drumline_requests_total{outcome="ok"}') >= 1
    assert metric_of(answer.text, 'drumline_requests_total{outcome="validation-error"}') >= 1
    assert metric_of(answer.text, 'drumline_rank_up{rank="1"}') == 1
    assert metric_of(answer.text, "drumline_time_to_first_event_seconds_count") >= 1
    assert metric_of(answer.text, "drumline_setup_seconds") > 0
    assert metric_of(answer.text, "drumline_requests_in_flight") == 0


async def test_openapi(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        *("/", "/stream", "/{namespace}/{name}", "/{namespace}/{name}/stream"),
        *("/healthz", "/startupz", "/readyz", "/status", "/metrics", "/requests/{request_id}/cancel"),
    }
    payload = document["components"]["schemas"]["Payload"]
    assert payload["required"] == ["prompt"]
    assert payload["properties"]["count"]["maximum"] == 4
    assert payload["properties"]["prompt"]["description"] == "comes back in the result."
    stream = document["paths"]["/stream"]["post"]["responses"]
    assert "text/event-stream" in stream["200"]["content"]
    for status in ("400", "413", "415", "422", "429", "499", "500", "503", "504"):
        assert "application/problem+json" in stream[status]["content"]
    for reference in re.findall(r'"\$ref":\s*"([^"]+)"', json.dumps(document)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


async def test_docs_page_needs_nothing_from_elsewhere(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text)
    assert "'sha256-" in answer.headers["content-security-policy"]
