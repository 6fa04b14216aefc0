"""The edge without sockets: order of events that a real client cannot force. Tickets are real, ranks are played."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from drumline import codec
from drumline.contract import RunnerSettings
from drumline.errors import DrumlineError, QueueFull, WorkerError
from drumline.runner.status import RunnerStatus
from drumline.runner.ticket import Ticket
from drumline.server import limits
from drumline.server.app import create_app
from drumline.server.body_budget import BodyBudget
from drumline.server.edge import Addresses, RefusedError, _Incoming
from drumline.server.service import Phase, Service

LEFT = {"type": "http.disconnect"}


class PlayedRunner:
    """Hands out real tickets; the test plays the ranks through ``finish`` and ``update``."""

    def __init__(self) -> None:
        self.observers: list[Any] = []
        self.request_schema: dict[str, Any] | None = None
        self.tickets: list[Ticket] = []
        self.submitted: list[dict[str, Any]] = []
        self.refuse: DrumlineError | None = None
        self.taken = asyncio.Event()
        self._numbers = itertools.count(1)

    def submit(self, payload: Any, **keywords: Any) -> Ticket:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append({"payload": payload, **keywords})
        ticket = Ticket(
            next(self._numbers),
            keywords.get("request_id") or "made",
            keywords.get("caller", ""),
            codec.pack(payload),
            streaming=keywords.get("streaming", False),
            images=keywords.get("images", "pixels"),
            deadline=0.0,
            headers=keywords.get("headers") or {},
            buffer_limit=1 << 20,
            cancel=lambda number, error: self.finish(error, number),
        )
        self.tickets.append(ticket)
        for observer in self.observers:
            observer.request_queued(ticket)
        ticket.started_at, ticket.queue_wait = ticket.queued_at, 0.0
        self.taken.set()
        return ticket

    def finish(self, error: DrumlineError | None = None, number: int | None = None, value: Any = None) -> None:
        ticket = next(t for t in self.tickets if number in (None, t.number) and not t.done)
        ticket.value = codec.pack(value)
        ticket.finish(error)
        for observer in self.observers:
            observer.request_finished(ticket)

    @property
    def status(self) -> RunnerStatus:
        return RunnerStatus("ready", 1, 2, 2, [], 0, None, 0, 0)

    def cancel(self, request_id: str) -> bool:
        return False

    async def drain(self, timeout: float) -> None: ...

    async def stop(self, timeout: float = 0) -> None: ...


class Client:
    """One ASGI request, message by message."""

    def __init__(
        self,
        app: Any,
        method: str = "POST",
        path: str = "/",
        headers: dict[str, str] | None = None,
        body: bytes | None = b"{}",
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.writable = asyncio.Event()
        self.writable.set()
        self.received = 0
        given = {"content-type": "application/json"} | {name.lower(): value for name, value in (headers or {}).items()}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("10.1.2.3", 5),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        if body is not None:
            self.messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.received += 1
        return await self.messages.get()

    async def _send(self, message: dict[str, Any]) -> None:
        await self.writable.wait()
        self.sent.append(message)

    def leave(self) -> None:
        self.messages.put_nowait(LEFT)

    async def answer(self) -> SimpleNamespace:
        await asyncio.wait_for(self.task, 4)
        start = self.sent[0]
        headers = {n.decode(): v.decode() for n, v in start["headers"]}
        body = b"".join(m.get("body", b"") for m in self.sent[1:])
        return SimpleNamespace(status=start["status"], headers=headers, body=body, json=lambda: json.loads(body))


def service_of(settings: RunnerSettings, **keywords: Any) -> Service:
    async def nothing() -> None: ...

    service = Service(settings, start=nothing, stop=nothing, **keywords)
    service.board.enter(Phase.READY)
    return service


@pytest.fixture
async def runner() -> PlayedRunner:
    return PlayedRunner()


@pytest.fixture
def make(runner: PlayedRunner) -> Callable[..., Any]:
    def build(**settings: Any) -> Any:
        return create_app(service_of(RunnerSettings(**settings), runner=runner))

    return build


async def test_result_and_request_id(runner: PlayedRunner, make: Any) -> None:
    client = Client(make(), headers={"X-Request-Id": "mine-1"}, body=b'{"a": 1}')
    await runner.taken.wait()
    runner.finish(value={"b": 2})
    answer = await client.answer()
    assert (answer.status, answer.json()) == (200, {"b": 2})
    assert answer.headers["x-request-id"] == "mine-1"
    assert runner.submitted[0]["payload"] == {"a": 1}
    assert runner.submitted[0]["request_id"] == "mine-1"
    assert runner.submitted[0]["caller"] == "10.1.2.3"


async def test_client_that_leaves_cancels_its_request(runner: PlayedRunner, make: Any) -> None:
    client = Client(make())
    await runner.taken.wait()
    client.leave()
    await asyncio.wait_for(client.task, 4)
    assert runner.tickets[0].outcome == "cancelled"


async def test_client_that_leaves_a_stream_cancels_it(runner: PlayedRunner, make: Any) -> None:
    client = Client(make(), path="/stream")
    await runner.taken.wait()
    runner.tickets[0].push(codec.pack({"n": 0}))
    client.leave()
    await asyncio.wait_for(client.task, 4)
    assert runner.tickets[0].outcome == "cancelled"


async def test_client_that_leaves_before_its_body_is_complete_submits_nothing(runner: PlayedRunner, make: Any) -> None:
    client = Client(make(), body=None)
    client.messages.put_nowait({"type": "http.request", "body": b'{"a"', "more_body": True})
    client.leave()
    await asyncio.wait_for(client.task, 4)
    assert runner.submitted == []
    assert client.sent == []


async def test_announced_size_is_refused_before_a_byte_is_read(make: Any) -> None:
    client = Client(make(max_body_bytes=100), headers={"Content-Length": "101"}, body=None)
    answer = await client.answer()
    assert (answer.status, client.received) == (413, 0)
    assert answer.json()["type"].endswith("/payload-too-large")


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_streamed_size_is_refused_as_soon_as_it_is_too_much(make: Any, path: str) -> None:
    client = Client(make(max_body_bytes=100), path=path, body=None)
    for _ in range(3):
        client.messages.put_nowait({"type": "http.request", "body": b"x" * 60, "more_body": True})
    assert (await client.answer()).status == 413
    assert client.received == 2


async def test_body_that_does_not_come_is_a_408(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_IDLE_SECONDS", 0.05)
    client = Client(make(), body=None)
    client.messages.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    assert (await client.answer()).status == 408


async def test_body_that_trickles_for_ever_is_a_408(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(limits, "BODY_BYTES_PER_SECOND", 1 << 40)
    client = Client(make(), body=None)

    async def trickle() -> None:
        while not client.task.done():
            client.messages.put_nowait({"type": "http.request", "body": b" ", "more_body": True})
            await asyncio.sleep(0)

    feeding = asyncio.create_task(trickle())
    assert (await client.answer()).status == 408
    await feeding


async def test_refusals_before_a_stream_begins_are_plain_answers(runner: PlayedRunner, make: Any) -> None:
    runner.refuse = QueueFull("64 wait already", depth=64, retry_after=3)
    answer = await Client(make(), path="/stream").answer()
    assert answer.status == 429
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "3"


async def test_error_of_a_stream_is_its_last_event(runner: PlayedRunner, make: Any) -> None:
    client = Client(make(), path="/stream", headers={"X-Request-Id": "r1"})
    await runner.taken.wait()
    runner.tickets[0].push(codec.pack({"n": 0}))
    runner.finish(WorkerError("boom", rank=1, exception_type="E"))
    answer = await client.answer()
    assert answer.status == 200
    update, error, rest = answer.body.split(b"\n\n")
    assert update == b'event: update\nid: 0\ndata: {"n":0}'
    head, data = error.split(b"\ndata: ")
    assert head == b"event: error\nid: 1"
    assert json.loads(data)["error"] == "rank 1: E: boom"
    assert json.loads(data)["request_id"] == "r1"
    assert rest == b""


async def test_slow_reader_holds_up_nobody(runner: PlayedRunner, make: Any) -> None:
    app = make()
    slow = Client(app, path="/stream")
    await runner.taken.wait()
    slow.writable.clear()
    for n in range(50):
        runner.tickets[0].push(codec.pack({"n": n}))
    runner.finish(number=1, value={"done": 1})
    runner.taken.clear()
    quick = Client(app)
    await runner.taken.wait()
    runner.finish(number=2, value={"quick": 1})
    assert (await quick.answer()).json() == {"quick": 1}
    assert not slow.task.done()
    slow.writable.set()
    assert (await slow.answer()).body.count(b"event: update") == 50


async def test_large_results_go_piece_by_piece(runner: PlayedRunner, make: Any) -> None:
    client = Client(make())
    await runner.taken.wait()
    text = "x" * (3 << 20)
    runner.finish(value={"text": text})
    answer = await client.answer()
    assert answer.json() == {"text": text}
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert max(len(m.get("body", b"")) for m in client.sent) <= limits.CHUNK_BYTES


async def test_times_formats_and_headers_reach_the_runner(runner: PlayedRunner, make: Any) -> None:
    headers = {
        "X-Request-Timeout": "2.5",
        "X-Fal-Request-Timeout": "7",
        "Authorization": "Key secret",
        "Cookie": "secret",
        "X-Api-Key": "secret",
        "traceparent": "00-1-2-03",
        "X-Drumline-Tag": "t",
    }
    client = Client(make(request_timeout=60, queue_timeout=30), headers=headers, body=b'{"image_format": "PNG"}')
    await runner.taken.wait()
    runner.finish()
    await client.answer()
    given = runner.submitted[0]
    assert (given["timeout"], given["queue_timeout"], given["images"]) == (2.5, 7, "png")
    assert given["headers"] == {"traceparent": "00-1-2-03", "x-drumline-tag": "t"}


@pytest.mark.parametrize(
    ("body", "images"), [(b"{}", "jpeg"), (b'{"image_format": "bmp"}', "jpeg"), (b'{"image_format": 3}', "jpeg")]
)
async def test_bounds_and_defaults(runner: PlayedRunner, make: Any, body: bytes, images: str) -> None:
    client = Client(make(request_timeout=60, queue_timeout=30), headers={"X-Request-Timeout": "9999"}, body=body)
    await runner.taken.wait()
    runner.finish()
    await client.answer()
    given = runner.submitted[0]
    assert (given["timeout"], given["queue_timeout"], given["images"]) == (60, 30, images)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
async def test_bad_timeouts_name_the_header(make: Any, value: str) -> None:
    answer = await Client(make(), headers={"X-Request-Timeout": value}).answer()
    assert answer.status == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "x-request-timeout"]


async def test_keys(runner: PlayedRunner, make: Any) -> None:
    app = make(api_keys=("k1", "k2"))
    assert (await Client(app).answer()).status == 401
    assert (await Client(app, "GET", "/status").answer()).status == 401
    assert (await Client(app, "GET", "/metrics").answer()).status == 401
    assert (await Client(app, "GET", "/healthz").answer()).status == 200
    assert (await Client(app, "GET", "/readyz").answer()).status == 200
    client = Client(app, headers={"Authorization": "Key k2"})
    await runner.taken.wait()
    runner.finish()
    assert (await client.answer()).status == 200
    assert runner.submitted[0]["caller"] == "key-1"


async def test_access_line_has_times_and_no_payload(
    runner: PlayedRunner, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = Client(make(), headers={"X-Request-Id": "line-1"}, body=b'{"prompt": "private"}')
    await runner.taken.wait()
    runner.finish(value={"secret": "result"})
    await client.answer()
    await asyncio.sleep(0)
    (record,) = [r for r in caplog.records if r.name == "drumline.access"]
    fields = vars(record)
    assert {
        k: fields[k] for k in ("method", "path", "status", "outcome", "request_id", "caller", "queue_wait", "bytes")
    } == {
        "method": "POST",
        "path": "/",
        "status": 200,
        "outcome": "ok",
        "request_id": "line-1",
        "caller": "anonymous",
        "queue_wait": 0.0,
        "bytes": len(b'{"secret":"result"}'),
    }
    assert fields["run_time"] >= 0
    assert "private" not in caplog.text
    assert "10.1.2.3" not in caplog.text


async def test_calls_are_refused_outside_of_ready(make: Any) -> None:
    app = make()
    board = app._service.board
    for phase, suffix in ((Phase.STARTING, "not-ready"), (Phase.DRAINING, "draining"), (Phase.STOPPED, "draining")):
        board.enter(phase)
        for path in ("/", "/stream"):
            answer = await Client(app, path=path).answer()
            assert answer.status == 503
            assert answer.json()["type"].endswith(f"/{suffix}")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await Client(app, "GET", "/readyz", body=b"").answer()).status == 503
        assert (await Client(app, "GET", "/healthz", body=b"").answer()).status == 200
    board.enter(Phase.LEAVING)
    assert (await Client(app, "GET", "/readyz", body=b"").answer()).status == 503


async def test_long_poll_wakes_with_the_change(make: Any) -> None:
    app = make()
    board = app._service.board
    client = Client(app, "GET", "/status", body=b"")
    version = (await client.answer()).json()["version"]
    waiting = asyncio.create_task(board.wait(version, 30))
    await asyncio.sleep(0)
    assert not waiting.done()
    board.enter(Phase.LEAVING)
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(board.wait(version, 30), 1)


@pytest.mark.parametrize(
    ("path", "own", "any_id", "below"),
    [
        ("/", ["/", "/stream"], False, "/"),
        ("/ns/app", ["/", "/stream"], False, "/"),
        ("/ns/app/", ["/", "/stream"], False, "/"),
        ("/ns/app/stream", ["/", "/stream"], False, "/stream"),
        ("/ns/app/requests/x/cancel", ["/", "/stream"], False, "/requests/x/cancel"),
        ("/ns/application", ["/", "/stream"], False, None),
        ("/other/app", ["/", "/stream"], False, None),
        ("/other/app/stream", ["/", "/stream"], True, "/stream"),
        ("/other/app", ["/", "/stream"], True, "/"),
        ("/requests/x/cancel", ["/", "/stream"], True, "/requests/x/cancel"),
        ("/status", ["/"], True, "/status"),
        ("/one", ["/"], True, "/one"),
        ("/image/make", ["/image/make"], True, "/image/make"),
        ("/ns/app/image/make", ["/image/make"], False, "/image/make"),
        ("/items/7", ["/items/{id}"], True, "/items/7"),
        ("//x", ["/"], True, "//x"),
    ],
)
def test_addresses(path: str, own: list[str], any_id: bool, below: str | None) -> None:
    addresses = Addresses(RunnerSettings(namespace="ns", name="app", any_id=any_id), own)
    if below is None:
        with pytest.raises(Exception, match="This server is ns/app") as caught:
            addresses.resolve(path)
        assert caught.value.problem.status == 404  # type: ignore[attr-defined]
    else:
        assert addresses.resolve(path) == below


class TestApps:
    """An App's own endpoints, which FastAPI serves."""

    @pytest.fixture
    def app(self, runner: PlayedRunner, monkeypatch: pytest.MonkeyPatch) -> Any:
        from drumline import context

        monkeypatch.setattr(context, "runners", [runner])
        router = APIRouter()

        @router.post("/")
        async def run(payload: dict[str, Any]) -> Any:
            info = context.current_request.get()
            assert info is not None
            ticket = runner.submit(payload, request_id=info.request_id, caller=info.caller)
            await ticket.result()
            return {"request_id": info.request_id}

        @router.post("/broken")
        async def broken() -> None:
            raise KeyError("private")

        @router.post("/cut")
        async def cut(request: Request) -> StreamingResponse:
            async def events() -> Any:
                yield b"data: 1\n\n"
                raise KeyError("private")

            return StreamingResponse(events())

        return create_app(service_of(RunnerSettings(max_body_bytes=1000), router=router))

    async def test_call(self, runner: PlayedRunner, app: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        client = Client(app, path="/default/app", headers={"X-Request-Id": "a1"}, body=b'{"p": 1}')
        await runner.taken.wait()
        runner.finish()
        answer = await client.answer()
        assert (answer.status, answer.json()) == (200, {"request_id": "a1"})
        assert answer.headers["x-request-id"] == "a1"
        assert runner.submitted[0]["caller"] == "10.1.2.3"
        await asyncio.sleep(0)
        (line,) = [record for record in caplog.records if record.name == "drumline.access"]
        assert line.run_time is not None

    async def test_client_that_leaves_cancels_what_its_endpoint_runs(self, runner: PlayedRunner, app: Any) -> None:
        client = Client(app)
        await runner.taken.wait()
        client.leave()
        await asyncio.wait_for(client.task, 4)
        assert runner.tickets[0].outcome == "cancelled"

    async def test_two_calls_of_one_id_are_cancelled_apart(self, runner: PlayedRunner, app: Any) -> None:
        clients = []
        for _ in range(2):
            runner.taken.clear()
            clients.append(Client(app, headers={"X-Request-Id": "same"}))
            await runner.taken.wait()
        clients[0].leave()
        await asyncio.wait_for(clients[0].task, 4)
        assert (runner.tickets[0].outcome, runner.tickets[1].outcome) == ("cancelled", None)
        runner.finish()
        assert (await clients[1].answer()).status == 200

    async def test_errors_of_the_endpoint(
        self, runner: PlayedRunner, app: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = Client(app)
        await runner.taken.wait()
        runner.finish(WorkerError("boom", rank=1, exception_type="E"))
        answer = await client.answer()
        assert (answer.status, answer.json()["rank"]) == (500, 1)
        broken = await Client(app, path="/broken", body=b"").answer()
        assert broken.json()["type"].endswith("/internal-error")
        assert "private" not in broken.body.decode()
        assert len([r for r in caplog.records if r.exc_info and r.exc_info[0] is KeyError]) == 1

    async def test_error_in_the_middle_of_an_answer_cuts_it(self, app: Any, caplog: pytest.LogCaptureFixture) -> None:
        client = Client(app, path="/cut", body=b"")
        await asyncio.wait_for(client.task, 4)
        assert client.sent[-1].get("more_body", False)
        assert len([r for r in caplog.records if r.exc_info and r.exc_info[0] is KeyError]) == 1

    @pytest.mark.parametrize(
        ("body", "content_type", "status", "suffix"),
        [
            (b"{", "application/json", 400, "invalid-json"),
            (b"[1]", "application/json", 422, "validation-error"),
            (b"{}", "text/plain", 415, "unsupported-media-type"),
            (b'{"a": "' + b"x" * 2000 + b'"}', "application/json", 413, "payload-too-large"),
        ],
    )
    async def test_bodies(self, app: Any, body: bytes, content_type: str, status: int, suffix: str) -> None:
        client = Client(app, headers={"content-type": content_type}, body=None)
        client.messages.put_nowait({"type": "http.request", "body": body[:100], "more_body": len(body) > 100})
        client.messages.put_nowait({"type": "http.request", "body": body[100:], "more_body": False})
        answer = await client.answer()
        assert (answer.status, answer.json()["type"].rpartition("/")[2]) == (status, suffix)
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        if status == 422:
            assert isinstance(answer.json()["detail"], list)

    async def test_unknown_path_and_method(self, app: Any) -> None:
        assert (await Client(app, path="/nope", body=b"").answer()).json()["type"].endswith("/not-found")
        wrong = await Client(app, "GET", "/", body=b"").answer()
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["type"].endswith("/method-not-allowed")


async def test_a_body_that_was_refused_stays_refused() -> None:
    """An endpoint that asks once more, after others made room, must not get the rest without the part that was dropped."""
    bodies = BodyBudget(100_000, 25_000)
    others = SimpleNamespace(body_bytes=0)
    bodies.hold(others, 90_000)
    parts = iter([b"a" * 10, b"b" * 70_000, b"c" * 10])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(parts), "more_body": True}

    incoming = _Incoming(SimpleNamespace(receive=receive, body_bytes=0), 80_000, bodies)  # type: ignore[arg-type]
    await incoming.begin()
    assert (await incoming.receive())["body"] == b"a" * 10
    with pytest.raises(RefusedError) as caught:
        await incoming.receive()
    assert caught.value.problem.suffix == "too-many-bytes"
    bodies.release(others)
    with pytest.raises(RefusedError):
        await incoming.receive()
    assert bodies.held == 0
