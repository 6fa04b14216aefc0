"""Clients against servers that answer byte by byte what a test says: splits, silence, broken connections."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from drumline.client import AsyncClient, Client, Event
from drumline.errors import (
    ConfigurationError,
    ConnectionFailed,
    DrumlineError,
    InvalidPayload,
    NotReady,
    QueueFull,
    RequestTimeout,
    WorkerError,
)
from drumline.problems import TYPE_PREFIX

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"


def answer(value, status="200 OK", headers=""):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    # A scripted connection answers once; without saying so, a retry could meet the old connection while it closes.
    fixed = f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"HTTP/1.1 {status}\r\n{fixed}{headers}\r\n".encode() + body


class Scripted:
    """A server on a real socket. Per connection one script: byte strings to send, and Events to wait for."""

    def __init__(self, *scripts):
        self.requests = []
        self.asked = threading.Event()
        self.closed_by_client = threading.Event()
        self._scripts = list(scripts)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        for script in self._scripts:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(4)
                self.requests.append(self._read(connection))
                self.asked.set()
                for part in script:
                    if isinstance(part, threading.Event):
                        part.wait(4)
                    else:
                        with contextlib.suppress(OSError):
                            connection.sendall(part)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                    if connection.recv(1) == b"":
                        self.closed_by_client.set()

    @staticmethod
    def _read(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        return lines[0], headers, body

    def close(self):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(4)
        assert not self._thread.is_alive()


@pytest.fixture
def scripted():
    servers = []

    def start(*scripts):
        servers.append(Scripted(*scripts))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def both(test):
    """Run ``test`` with the synchronous and with the asynchronous client."""
    return pytest.mark.parametrize("kind", ["sync", "async"])(test)


def call(kind, url, use, **settings):
    """Return ``use(client)`` for a client of ``kind``, awaited where it must be."""
    if kind == "sync":
        with Client(url, **settings) as client:
            return use(client)

    async def run():
        async with AsyncClient(url, **settings) as client:
            return await use(client)

    return asyncio.run(run())


def events(kind, url, seen=None, **settings):
    """All events of one stream; ``seen`` has them even when it fails."""
    seen = [] if seen is None else seen
    if kind == "sync":
        with Client(url, **settings) as client:
            for event in client.stream({"a": 1}):
                seen.append(event)  # what came before an error counts
        return seen

    async def run():
        async with AsyncClient(url, **settings) as client:
            async for event in client.stream({"a": 1}):
                seen.append(event)
        return seen

    return asyncio.run(run())


@both
def test_invoke_sends_json_key_and_id(kind, scripted):
    server = scripted([answer({"ok": [1]})])
    result = call(kind, server.url, lambda client: client.invoke({"prompt": "ä"}, request_id="r-1"), api_key="k")
    assert result == {"ok": [1]}
    line, headers, body = server.requests[0]
    assert line == "POST / HTTP/1.1"
    assert headers["authorization"] == "Key k"
    assert headers["x-request-id"] == "r-1"
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"prompt": "ä"}


@both
def test_paths_below_an_app_id(kind, scripted):
    server = scripted([answer({})], [answer({"state": "ready"})])
    call(kind, server.url + "/ns/app/", lambda client: client.invoke(path="/fast"))
    assert call(kind, server.url + "/ns/app", lambda client: client.status()) == {"state": "ready"}
    assert [line for line, _, _ in server.requests] == ["POST /ns/app/fast HTTP/1.1", "GET /status HTTP/1.1"]


@both
def test_cancel(kind, scripted):
    server = scripted([answer({"ok": True})], [answer({}, "404 Not Found")])
    assert call(kind, server.url, lambda client: client.cancel("r-1")) is True
    assert call(kind, server.url, lambda client: client.cancel("r-1")) is False
    assert server.requests[0][0] == "POST /requests/r-1/cancel HTTP/1.1"


@both
def test_a_problem_is_its_error(kind, scripted):
    body = {"type": TYPE_PREFIX + "worker-error", "error": "x", "message": "boom", "rank": 1, "exception_type": "E"}
    server = scripted([answer(body, "500 Oh", "X-Request-Id: r-9\r\n")])
    with pytest.raises(WorkerError, match="rank 1: E: boom") as caught:
        call(kind, server.url, lambda client: client.invoke())
    assert caught.value.request_id == "r-9"


@both
def test_an_answer_that_is_not_json(kind, scripted):
    server = scripted([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"])
    with pytest.raises(DrumlineError, match="answered with text/html, which is not JSON"):
        call(kind, server.url, lambda client: client.invoke())


@both
def test_nobody_there(kind):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionFailed, match=f"cannot reach http://127.0.0.1:{port}/") as caught:
        call(kind, f"127.0.0.1:{port}", lambda client: client.invoke())
    assert not caught.value.sent


@both
def test_a_connection_that_breaks_is_not_tried_again(kind, scripted):
    server = scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"], [answer({})])
    with pytest.raises(ConnectionFailed, match="broke") as caught:
        call(kind, server.url, lambda client: client.invoke(), retries=3)
    assert caught.value.sent
    assert len(server.requests) == 1


@both
def test_a_time_out_ends_a_request(kind, scripted):
    never = threading.Event()
    server = scripted([never])
    began = time.monotonic()
    with pytest.raises(RequestTimeout, match=r"within 0.2 s") as caught:
        call(kind, server.url, lambda client: client.invoke(timeout=0.2, request_id="r-1"))
    never.set()
    assert time.monotonic() - began < 2
    assert caught.value.request_id == "r-1"
    assert 0 < float(server.requests[0][1]["x-request-timeout"]) <= 0.2


@both
def test_a_time_out_ends_an_answer_that_never_ends(kind, scripted):
    over = threading.Event()

    class Dripping(threading.Event):
        """Stands in the script for bytes that keep coming until the client has enough."""

        def wait(self, timeout=None):
            return over.wait(0.05)

    drops = [part for _ in range(60) for part in (b"x", Dripping())]
    server = scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *drops])
    with pytest.raises(RequestTimeout):
        call(kind, server.url, lambda client: client.invoke(timeout=0.3))
    over.set()


@both
def test_retries_wait_as_told_and_keep_the_id(kind, scripted):
    busy = answer({"type": TYPE_PREFIX + "queue-full", "error": "full"}, "429 No", "Retry-After: 0\r\n")
    server = scripted([busy], [answer({}, "503 No", "Retry-After: 0\r\n")], [answer({"n": 3})])
    assert call(kind, server.url, lambda client: client.invoke(), retries=2) == {"n": 3}
    assert len({headers["x-request-id"] for _, headers, _ in server.requests}) == 1


@both
def test_retries_are_bounded(kind, scripted):
    server = scripted(*[[answer({}, "503 No", "Retry-After: 0\r\n")]] * 3)
    with pytest.raises(NotReady):
        call(kind, server.url, lambda client: client.invoke(), retries=2)
    assert len(server.requests) == 3


@both
def test_no_retry_unless_asked(kind, scripted):
    server = scripted([answer({}, "429 No")], [answer({})])
    with pytest.raises(QueueFull):
        call(kind, server.url, lambda client: client.invoke())
    assert len(server.requests) == 1


@both
def test_no_pause_goes_beyond_the_time_out(kind, scripted):
    server = scripted([answer({}, "503 No", "Retry-After: 30\r\n")], [answer({})])
    began = time.monotonic()
    with pytest.raises(NotReady):
        call(kind, server.url, lambda client: client.invoke(timeout=1), retries=5)
    assert time.monotonic() - began < 1


STREAM = (
    b': hello\r\n\r\nevent: update\r\nid: 0\r\ndata: {"x": "\xc3\xa4"}\r\n\r\n'
    b'event: update\nid: 1\ndata: [1,\ndata: 2]\n\n: ping\n\nevent: result\nid: 2\ndata: {"y": 1}\n\n'
)
EVENTS = [Event("update", 0, {"x": "ä"}), Event("update", 1, [1, 2]), Event("result", 2, {"y": 1})]


@both
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_stream_in_any_pieces(kind, size, scripted):
    server = scripted([SSE] + [STREAM[at : at + size] for at in range(0, len(STREAM), size)])
    assert events(kind, server.url) == EVENTS
    line, headers, _ = server.requests[0]
    assert line == "POST /stream HTTP/1.1"
    assert headers["accept"] == "text/event-stream"


@both
def test_large_events(kind, scripted):
    image = "A" * (3 << 20)
    server = scripted([SSE, b'event: result\ndata: "', image.encode(), b'"\n\n'])
    assert events(kind, server.url) == [Event("result", None, image)]


@both
def test_an_error_event_is_raised_after_the_updates(kind, scripted):
    problem = {"type": TYPE_PREFIX + "worker-error", "message": "boom", "rank": 0, "exception_type": "E", "error": "x"}
    server = scripted([SSE, b"event: update\ndata: 1\n\nevent: error\ndata: " + json.dumps(problem).encode() + b"\n\n"])
    seen = []
    with pytest.raises(WorkerError, match="boom") as caught:
        events(kind, server.url, seen)
    assert [event.data for event in seen] == [1]
    assert caught.value.request_id


@both
def test_a_stream_that_ends_without_a_result_is_broken(kind, scripted):
    server = scripted([SSE, b"event: update\ndata: 1\n\n"])
    with pytest.raises(ConnectionFailed, match="ended before its result"):
        events(kind, server.url)


@both
def test_a_stream_without_names_ends_when_it_ends(kind, scripted):
    server = scripted([SSE, b"data: 1\n\ndata: 2\n\n"])
    assert [event.data for event in events(kind, server.url)] == [1, 2]


@both
def test_a_silent_stream_is_broken(kind, scripted):
    never = threading.Event()
    server = scripted([SSE, b"event: update\ndata: 1\n\n", never])
    with pytest.raises(ConnectionFailed, match="silent"):
        events(kind, server.url, silence=0.2)
    never.set()


@both
def test_a_stream_is_bounded_by_its_time_out(kind, scripted):
    never = threading.Event()
    server = scripted([SSE, b": ping\n\n", never])
    with pytest.raises(RequestTimeout):
        events(kind, server.url, timeout=0.3)
    never.set()


@both
def test_an_answer_that_is_no_stream(kind, scripted):
    server = scripted([answer({"ok": 1})])
    with pytest.raises(DrumlineError, match="does not answer with an event stream"):
        events(kind, server.url)


@both
def test_leaving_a_stream_closes_its_connection(kind, scripted):
    never = threading.Event()
    server = scripted([SSE, b"event: update\ndata: 1\n\n", never])

    async def run():
        async with AsyncClient(server.url) as client, client.stream() as stream:
            assert (await anext(stream)).data == 1

    if kind == "async":
        asyncio.run(run())
    else:
        with Client(server.url) as client, client.stream() as stream:
            assert next(stream).data == 1
    never.set()
    assert server.closed_by_client.wait(4)


def test_cancelling_the_task_closes_the_connection(scripted):
    never = threading.Event()
    server = scripted([never])

    async def run():
        async with AsyncClient(server.url) as client:
            task = asyncio.create_task(client.invoke())
            assert await asyncio.to_thread(server.asked.wait, 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    never.set()
    assert server.closed_by_client.wait(4)


def test_streams_of_two_threads(scripted):
    server = scripted([SSE, STREAM], [SSE, STREAM])
    got = []
    with Client(server.url) as client:
        threads = [threading.Thread(target=lambda: got.append(list(client.stream()))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4)
    assert got == [EVENTS, EVENTS]


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://[::1", "file:///etc"])
def test_a_bad_url_is_told(url):
    with pytest.raises(ConfigurationError, match="url"):
        Client(url)


def test_a_bad_certificate_file_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="PEM"):
        Client("https://x", verify=str(tmp_path / "none.pem"))


@pytest.mark.parametrize("payload", [{"x": float("nan")}, {"x": object()}, {"x": b"bytes"}])
def test_a_payload_that_is_not_json_is_told(payload):
    with Client("http://localhost:1") as client, pytest.raises(InvalidPayload, match="not JSON"):
        client.invoke(payload)


def test_no_proxy_stands_between_us_and_this_machine(scripted, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server = scripted([answer({"ok": 1})])
    with Client(server.url) as client:
        assert client.invoke() == {"ok": 1}
