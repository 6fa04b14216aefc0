"""What hostile and clumsy clients may do to the socket: every wait and every size is bounded."""

from __future__ import annotations

import contextlib
import email.utils
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from drumline.server import limits
from drumline.testing.answers import metric_of
from drumline.testing.serving import Server, running, service_for

TARGET = "drumline.testing.served:Served"
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda: service_for(TARGET, world_size=1, max_body_bytes=1 << 20, api_keys=["k1", "k2"])) as made:
        yield made


class Raw:
    """A socket and what came back on it."""

    def __init__(self, server: Server) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], Any]:
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        body = self.file.read(int(headers["content-length"]))
        return status, headers, json.loads(body)

    def closed(self) -> bool:
        """Wait for the server to close the connection."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


def test_keys_are_needed(server: Server) -> None:
    with httpx2.Client(base_url=server.url) as client:
        for method, path in (
            ("POST", "/"),
            ("POST", "/stream"),
            ("GET", "/status"),
            ("GET", "/metrics"),
            ("GET", "/docs"),
        ):
            answer = client.request(method, path, json={"prompt": "x"})
            assert answer.status_code == 401
            assert answer.json()["type"].endswith("/unauthorized")
            assert "Key" in answer.headers["www-authenticate"]
        for path in ("/healthz", "/readyz", "/startupz"):
            assert client.get(path).status_code == 200
        for headers in ({"Authorization": "Key k1"}, {"Authorization": "Bearer k2"}, {"X-API-Key": "k1"}):
            assert client.post("/", json={"prompt": "x"}, headers=headers).status_code == 200
        assert client.post("/", json={"prompt": "x"}, headers={"X-API-Key": "k3"}).status_code == 401
        document = client.get("/openapi.json", headers={"X-API-Key": "k1"}).json()
        assert set(document["components"]["securitySchemes"]) == {"key", "bearer"}


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"x-large: " + b"a" * limits.MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"x-large: " + b"a" * (400 << 10),  # never ends
        b"GET /" + b"a" * (limits.MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\n\r\n",
        HEAD + b"".join(b"x-%d: 1\r\n" % n for n in range(limits.MAX_HEADERS)) + b"\r\n",
        b"".join([HEAD, *[b"a: b\r\n"] * 50_000]),
    ],
    ids=["large header", "endless header", "long path", "many headers", "endless headers"],
)
def test_head_that_is_too_large(server: Server, head: bytes) -> None:
    with Raw(server) as raw:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer came while the rest was sent
            raw.send(head)
        try:
            status, headers, body = raw.answer()
        except (ConnectionResetError, IndexError):
            assert len(head) > 256 << 10  # cut while we still sent: a reset may overtake the answer
            return
        assert (status, body["type"].rpartition("/")[2]) == (431, "headers-too-large")
        assert headers["connection"] == "close"
        assert headers["x-request-id"] == body["request_id"]
        assert raw.closed()


def test_what_is_not_http(server: Server) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELO there\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with Raw(server) as raw:
            raw.send(nonsense)
            status, headers, body = raw.answer()
            assert (status, body["type"].rpartition("/")[2]) == (400, "bad-request")
            assert headers["content-type"] == "application/problem+json"
            assert raw.closed()


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD], ids=["nothing", "half a line", "half a head"])
def test_head_that_does_not_come(server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    began = time.monotonic()
    with Raw(server) as raw:
        raw.send(sent)
        assert raw.closed()
    assert 0.1 < time.monotonic() - began < 10


def test_head_that_trickles(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    with Raw(server) as raw:
        raw.send(HEAD)
        raw.socket.settimeout(0.02)
        for _ in range(500):
            try:
                raw.send(b"a: b\r\n")
                if raw.socket.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return
        pytest.fail("a head that never ends was waited for")


def test_empty_lines_are_no_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before the first one nor in place of a next one, for which a kept connection would be closed."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    with Raw(server) as raw:
        raw.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert raw.answer()[0] == 200
        raw.send(b"\r\n")
        assert raw.closed()


def test_next_request_on_a_kept_connection_has_the_same_bound(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    whole = HEAD + b'x-api-key: k1\r\ncontent-length: 15\r\n\r\n{"prompt": "x"}'
    with Raw(server) as raw:
        for _ in range(3):
            raw.send(whole)
            assert raw.answer()[0] == 200
        raw.send(HEAD)
        assert raw.closed()


def test_body_that_does_not_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_IDLE_SECONDS", 0.2)
    with Raw(server) as raw:
        raw.send(HEAD + b"x-api-key: k1\r\ncontent-length: 100\r\n\r\n{")
        status, _, body = raw.answer()
        assert (status, body["type"].rpartition("/")[2]) == (408, "body-timeout")


def test_early_answer_reaches_a_client_that_still_sends(server: Server) -> None:
    size = 64 << 20
    with Raw(server) as raw:
        raw.send(HEAD + b"x-api-key: k1\r\ncontent-length: %d\r\n\r\n" % size)
        assert raw.answer()[0] == 413
        for _ in range(size >> 20):
            raw.send(b"x" * (1 << 20))
        raw.send(HEAD + b'x-api-key: k1\r\ncontent-length: 15\r\n\r\n{"prompt": "x"}')
        assert raw.answer()[0] == 200


def test_rest_of_a_refused_body_is_not_read_for_ever(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS", 0.3)
    with Raw(server) as raw:
        raw.send(HEAD + b"x-api-key: k1\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        began = time.monotonic()
        cut = False
        while not cut and time.monotonic() - began < 15:
            try:
                raw.send(chunk)
            except (BrokenPipeError, ConnectionResetError):
                cut = True
        assert cut


def test_reader_that_takes_nothing_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.3)
    name = 'drumline_requests_total{outcome="cancelled"}'
    with httpx2.Client(base_url=server.url, headers={"X-API-Key": "k1"}, timeout=30) as client:
        before = metric_of(client.get("/metrics").text, name)
        with Raw(server) as raw:
            body = json.dumps({"prompt": "x", "steps": 5000, "seconds": 0.01, "update_bytes": 900_000}).encode()
            head = HEAD.replace(b"POST /", b"POST /stream") + b"x-api-key: k1\r\n"
            raw.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            began = time.monotonic()
            while metric_of(client.get("/metrics").text, name) == before:
                assert time.monotonic() - began < 20
        assert client.post("/", json={"prompt": "x"}).status_code == 200


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with Raw(server) as raw:
        for n in range(3):
            body = json.dumps({"prompt": str(n)}).encode()
            raw.send(HEAD + b"x-api-key: k1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert [raw.answer()[2]["prompt"] for _ in range(3)] == ["0", "1", "2"]


def test_an_answer_has_the_same_headers_on_a_connection_that_stays_and_on_one_that_is_closed(server: Server) -> None:
    """We write the first ourselves, uvicorn the second."""
    answers = []
    for last in (b"", b"connection: close\r\n"):
        with Raw(server) as raw:
            body = json.dumps({"prompt": "same"}).encode()
            head = HEAD + b"x-api-key: k1\r\nx-request-id: mine\r\n" + last
            for _ in range(1 if last else 2):  # the second on a connection shows that the first has left it in order
                raw.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
                answers.append(raw.answer())
            assert not last or raw.closed()
    for _, headers, _ in answers:
        assert email.utils.parsedate_to_datetime(headers.pop("date")).tzinfo is not None
    assert answers[2][1].pop("connection") == "close"
    assert answers[0] == answers[1] == answers[2]
    assert set(answers[0][1]) == {"content-type", "content-length", "x-request-id"}
