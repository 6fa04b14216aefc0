"""What somebody without a key can do to a ``drumline serve``: each connection ends, others are served, nothing grows."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from drumline.problems import CATALOGUE
from drumline.server import limits

CONNECTIONS = 30
#: Four bodies of the largest size.
BODIES = 4 << 20
WAIT = 30.0
KEY = b"x-api-key: k1\r\n"
JSON = b"content-type: application/json\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
CALL = POST + KEY + JSON + b'content-length: 15\r\n\r\n{"prompt": "x"}'
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
#: Growth of the server's memory that is no sign of anything: its allocators keep some of what they had.
STEADY_BYTES = 48 << 20


class Target:
    """A ``drumline serve`` process with an API key and few connections."""

    def __init__(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRUMLINE_")}
        settings = {
            "TARGET": "drumline.testing.served:Served",
            "DEVICE": "cpu",
            "PORT": "0",
            "API_KEYS": '["k1"]',
            "MAX_CONNECTIONS": str(CONNECTIONS),
            "MAX_QUEUE_DEPTH": "4",
            "MAX_BODY_BYTES": str(1 << 20),
            "MAX_BODIES_BYTES": str(BODIES),
            "DRAIN_DELAY": "0",
            "LOG_FORMAT": "json",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "drumline", "serve"],
            stdout=subprocess.PIPE,
            env={**inherited, **{f"DRUMLINE_{name}": value for name, value in settings.items()}},
        )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        while (record := self._lines.get(timeout=WAIT)) is not None:
            if record["message"].startswith("ready: "):
                break
        assert record is not None, self.process.wait()
        self.port = int(record["url"].rpartition(":")[2])
        self.seen = psutil.Process(self.process.pid)
        self.call()
        self.descriptors = self.seen.num_fds() + 3  # for connections whose end is on the way

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def log(self) -> list[dict[str, Any]]:
        """Lines since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                found.append(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def connect(self) -> Raw:
        return Raw(socket.create_connection(("127.0.0.1", self.port), timeout=WAIT))

    def get(self, path: str, method: str = "GET") -> tuple[int, Any]:
        """Ask on a new connection, with the key."""
        client = HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        with contextlib.closing(client):
            client.request(method, path, headers={"X-API-Key": "k1"})
            answer = client.getresponse()
            body = answer.read()
            return answer.status, json.loads(body) if body else None

    def call(self) -> int:
        """Invoke on a new connection; return the status."""
        with self.connect() as raw:
            raw.send(CALL)
            return raw.answer()[0]

    def check(self) -> None:
        """It serves, its ranks live, and nobody's request is left over."""
        assert self.call() == 200
        status = self.get("/status")[1]
        assert (status["state"], status["restarts"], status["inFlight"], status["queueDepth"]) == ("ready", 0, 0, 0)


class Raw:
    """A socket, and the answers that come on it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.file = sock.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def flood(self, data: bytes, most: int) -> bool:
        """Send ``data`` again and again; True when the server ended that before ``most`` bytes."""
        try:
            for _ in range(0, most, len(data)):
                self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        first = self.file.readline()
        found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]*\r\n", first)
        assert found, first
        headers = {}
        while (line := self.file.readline()) != b"\r\n":
            name, colon, value = line.decode("latin-1").rstrip("\r\n").partition(": ")
            assert colon, line
            headers[name] = value
        if int(found[1]) == 100:
            return 100, headers, b""
        body = self.file.read(int(headers["content-length"]))
        assert len(body) == int(headers["content-length"])
        return int(found[1]), headers, body

    def answers(self) -> list[int]:
        """All answers until the connection ends; a problem is looked at."""
        found = []
        with contextlib.suppress(ConnectionResetError):
            while self.file.peek(1):
                status, headers, body = self.answer()
                found.append(status)
                if status >= 400:
                    problem = json.loads(body)
                    assert CATALOGUE[problem["type"].rpartition("/")[2]][0] == status
                    assert problem["request_id"] == headers["x-request-id"]
        return found

    def closed(self) -> bool:
        """Wait until the server closes."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    try:
        yield made
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(WAIT) == 0
    finally:
        made.close()


@pytest.fixture(autouse=True)
def nothing_grows(target: Target) -> Iterator[None]:
    """After each test: others are served, no descriptor and no memory is kept, and no error was logged."""
    target.call()
    target.log()
    memory = target.seen.memory_info().rss
    yield
    target.check()
    assert target.seen.memory_info().rss < memory + STEADY_BYTES
    assert [line for line in target.log() if line["level"] == "error" or "exception" in line] == []
    # Connections that were closed at our end are closed at the other as soon as it has read that.
    for _ in range(100):
        if target.seen.num_fds() <= target.descriptors:
            break
        target.call()
    assert target.seen.num_fds() <= target.descriptors


# -- shapes of requests. Answers, then whether the connection goes on (a health check on it is answered).

CHUNKED = POST + KEY + JSON + b"transfer-encoding: chunked\r\n"
UPGRADE = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
WEBSOCKET = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n"
X = b'{"prompt": "x"}'
CHUNK = b"f\r\n" + X + b"\r\n0\r\n"
SHAPES: dict[str, tuple[bytes, list[int], bool]] = {
    # one message, two readings (request smuggling)
    "length and chunked": (CHUNKED + b"content-length: 4\r\n\r\n" + CHUNK + b"\r\n", [400], False),
    "two lengths": (POST + KEY + JSON + b"content-length: 15\r\ncontent-length: 2\r\n\r\n" + X, [400], False),
    "one length twice": (POST + KEY + JSON + b"content-length: 15\r\ncontent-length: 15\r\n\r\n" + X, [400], False),
    "list of lengths": (POST + KEY + JSON + b"content-length: 15, 15\r\n\r\n" + X, [400], False),
    "signed length": (POST + KEY + JSON + b"content-length: +15\r\n\r\n" + X, [400], False),
    "negative length": (POST + KEY + JSON + b"content-length: -1\r\n\r\n" + X, [400], False),
    "length in hexadecimal": (POST + KEY + JSON + b"content-length: 0xf\r\n\r\n" + X, [400], False),
    "length with underscore": (POST + KEY + JSON + b"content-length: 1_5\r\n\r\n" + X, [400], False),
    "length over 64 bits": (POST + KEY + JSON + b"content-length: 99999999999999999999\r\n\r\n", [400], False),
    "length of 64 bits": (POST + KEY + JSON + b"content-length: 18446744073709551615\r\n\r\n", [413], False),
    "unknown coding": (CHUNKED.replace(b"chunked", b"xchunked") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "two codings": (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "chunked is not last": (CHUNKED.replace(b"chunked", b"chunked, identity") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "chunked twice": (CHUNKED + b"transfer-encoding: chunked\r\n\r\n" + CHUNK + b"\r\n", [400], False),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "space before colon": (CHUNKED.replace(b"encoding:", b"encoding :") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "folded header": (CHUNKED.replace(b"encoding:", b"encoding:\r\n") + b"\r\n" + CHUNK + b"\r\n", [400], False),
    "lines without carriage return": (HEALTH.replace(b"\r", b""), [400], False),
    "carriage return in a header": (HEALTH.replace(b"x\r", b"x\ry: z\r"), [400], False),
    "zero byte in a header": (HEALTH.replace(b" x", b" \0"), [400], False),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", [400], False),
    "two hosts": (HEALTH.replace(b"host", b"host: y\r\nhost"), [400], False),
    "two keys": (CALL.replace(KEY, b"x-api-key: no\r\n" + KEY), [400], False),
    "two content types": (CALL.replace(JSON, b"content-type: text/plain\r\n" + JSON), [400], False),
    "trailers pass for headers": (
        POST + JSON + b"transfer-encoding: chunked\r\n\r\n" + CHUNK + KEY + b"\r\n", [401], True,
    ),
    "trailers override headers": (
        CHUNKED + b"\r\n" + CHUNK + b"content-type: text/plain\r\nx-api-key: no\r\n\r\n", [200], True,
    ),
    # chunks
    "chunk of negative size": (CHUNKED + b"\r\n-f\r\n" + X, [400], False),
    "chunk over 64 bits": (CHUNKED + b"\r\nfffffffffffffffff\r\n" + X, [400], False),
    "chunk too short": (CHUNKED + b"\r\ne\r\n" + X + b"\r\n0\r\n\r\n", [400], False),
    "chunk without its end": (CHUNKED + b"\r\nf\r\n" + X + b"0\r\n\r\n", [400], False),
    "chunk extension": (CHUNKED + b"\r\nf;a=b\r\n" + X + b"\r\n0\r\n\r\n", [200], True),
    # versions, methods, forms of the target
    "HTTP/1.0": (HEALTH.replace(b"1.1", b"1.0"), [200], False),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", [400], False),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], False),
    "lower case": (HEALTH.replace(b"GET", b"get"), [400], False),
    "absolute form": (HEALTH.replace(b" /", b" http://elsewhere/"), [200], True),
    "proxy": (b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: x\r\n\r\n", [400], False),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", [401], True),
    "preflight": (b"OPTIONS / HTTP/1.1\r\nhost: x\r\n" + KEY + b"\r\n", [405], True),
    "trace": (b"TRACE / HTTP/1.1\r\nhost: x\r\n" + KEY + b"\r\n", [405], True),
    "bytes in the path": (HEALTH.replace(b"healthz", b"\xff"), [400], False),
    "broken UTF-8 in the path": (HEALTH.replace(b"healthz", b"%ff%fe%00%0a"), [401], True),
    "dots in the path": (HEALTH.replace(b"healthz", b"healthz/../status"), [401], True),
    "long path": (HEALTH.replace(b"healthz", b"a" * (limits.MAX_HEAD_BYTES + 1)), [431], False),
    "fragment": (HEALTH.replace(b"healthz", b"healthz#" + b"a" * 1000), [200], True),
    # upgrades are declined, and the request is served as it is
    "h2c": (HEALTH.replace(b"host", UPGRADE + b"host"), [200], True),
    "h2c with a body": (CALL.replace(b"host", UPGRADE + b"host"), [200], True),
    "h2c with chunks": (CHUNKED.replace(b"host", UPGRADE + b"host") + b"\r\n" + CHUNK + b"\r\n", [200], True),
    "h2c, then another request": (HEALTH.replace(b"host", UPGRADE + b"host") + HEALTH, [200, 200], True),
    "websocket": (HEALTH.replace(b"host", WEBSOCKET + b"host"), [200], True),
    "websocket without a key": (CALL.replace(KEY, WEBSOCKET), [401], True),
    # bodies
    "broken UTF-8": (CALL.replace(b'"x"', b'"\xff"'), [400], True),
    "other header bytes": (HEALTH.replace(b"host", b"x-request-id: \xff\xfe\r\nhost"), [200], True),
    "body of a GET": (HEALTH.replace(b"host", b"content-length: 3\r\nhost") + b"abc", [200], True),
    "expectation": (CALL.replace(b"host", b"expect: 100-continue\r\nhost").removesuffix(X), [100], False),
    "expectation without a key": (
        CALL.replace(KEY, b"expect: 100-continue\r\n").removesuffix(X), [401], False,
    ),
    # several requests
    "empty lines before": (b"\r\n\r\n" + HEALTH, [200], True),
    "what is no request, behind one": (CALL + b"\0garbage\r\n\r\n", [200], False),
    "what is no request, behind two": (CALL + HEALTH + b"\0garbage\r\n\r\n", [200, 200], False),
    "what is no chunk, behind one": (CALL + CHUNKED + b"\r\n?", [200], False),
    "behind a last request": (HEALTH.replace(b"host", b"connection: close\r\nhost") + CALL, [200], False),
    "what is no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400], False),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_requests(target: Target, shape: str) -> None:
    data, expected, goes_on = SHAPES[shape]
    with target.connect() as raw:
        raw.send(data)
        assert [raw.answer()[0] for _ in expected] == expected
        if goes_on:
            raw.send(HEALTH)
            assert raw.answer()[0] == 200
            assert target.call() == 200
            return
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.closed()
    logged = [line for line in target.log() if line["level"] != "info"]
    assert logged == []


def test_body_of_a_request_that_offers_an_upgrade_is_read(target: Target) -> None:
    with target.connect() as raw:
        raw.send(CALL.replace(b"host", UPGRADE + b"host"))
        assert json.loads(raw.answer()[2])["prompt"] == "x"


def test_who_answers_get_answers_head(target: Target) -> None:
    with target.connect() as raw:
        for path in (b"/healthz", b"/readyz"):
            raw.send(HEALTH.replace(b"GET /healthz", b"HEAD " + path))
            head = b"".join(iter(raw.file.readline, b"\r\n"))
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert int(re.findall(rb"content-length: (\d+)", head)[0]) > 0
        raw.send(HEALTH)
        assert raw.answer()[0] == 200
    assert target.get("/", "HEAD")[0] == 405


# -- connections that end early, or not at all


def test_client_that_leaves_after_any_byte(target: Target) -> None:
    whole = CALL.replace(b"POST /", b"POST /stream") + HEALTH
    for length in range(len(whole)):
        sock = socket.create_connection(("127.0.0.1", target.port), timeout=WAIT)
        sock.sendall(whole[:length])
        if length % 2:  # with a reset, as when a process is killed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def test_client_that_closes_its_half(target: Target) -> None:
    """It counts as gone: its request is cancelled, and the connection ends."""
    for length in (0, 1, 20, len(CALL) - 1, len(CALL)):
        with target.connect() as raw:
            raw.send(CALL[:length])
            raw.socket.shutdown(socket.SHUT_WR)
            assert set(raw.answers()) <= {200}


def waiting(target: Target, kind: str) -> Raw:
    """A connection that does nothing more."""
    raw = target.connect()
    match kind:
        case "head":
            raw.send(POST)
        case "answered":
            raw.send(HEALTH)
            assert raw.answer()[0] == 200
        case "refused body":
            raw.send(CALL.replace(KEY, b"").replace(b": 15", b": 99"))
            assert raw.answer()[0] == 401
        case "long poll":
            raw.send(HEALTH.replace(b"healthz", b"readyz?since=%d" % target.get("/status")[1]["version"]))
        case "body":
            raw.send(CALL.replace(b": 15", b": 99"))
        case "unread answers":
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.send(HEALTH * limits.MAX_PIPELINED)
    return raw


@pytest.mark.parametrize("kind", ["nothing", "head", "answered", "refused body", "long poll", "body", "unread answers"])
def test_connections_that_wait_lock_nobody_out(target: Target, kind: str) -> None:
    with contextlib.ExitStack() as held:
        stream = held.enter_context(target.connect())
        body = json.dumps({"prompt": "x", "steps": 1000, "seconds": 0.01}).encode()
        stream.send(
            CALL.replace(b"POST /", b"POST /stream").replace(b"15\r\n\r\n" + X, b"%d\r\n\r\n%s" % (len(body), body))
        )
        assert stream.file.readline() == b"HTTP/1.1 200 OK\r\n"
        for _ in range(3 * CONNECTIONS):
            held.enter_context(waiting(target, kind))
            assert target.seen.num_fds() < 3 * CONNECTIONS
        with target.connect() as raw:
            raw.send(HEALTH)
            assert raw.answer()[0] == 200
        assert target.get("/readyz")[0] == 200
        # Who has a call in hand keeps it.
        assert target.get("/status")[1]["inFlight"] == 1
        stream.socket.settimeout(0.0)
        assert not is_over(stream.socket)
    target.check()  # a call waits for the one before: its client is gone


def is_over(sock: socket.socket) -> bool:
    """Whether the other end has closed, once everything that came is read."""
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    return True


# -- floods


ENDLESS = {
    "trailers": (CHUNKED + b"\r\n" + CHUNK, b"a: b\r\n" * 10_000),
    "trailers without a key": (CHUNKED.replace(KEY, b"") + b"\r\n" + CHUNK, b"a: b\r\n" * 10_000),
    "one trailer": (CHUNKED + b"\r\n" + CHUNK + b"a: ", b"b" * 60_000),
    "one trailer without a key": (CHUNKED.replace(KEY, b"") + b"\r\n" + CHUNK + b"a: ", b"b" * 60_000),
    "a chunk's extension": (CHUNKED + b"\r\nf;", b"b" * 60_000),
    "headers": (POST, b"a: b\r\n" * 10_000),
    "one header": (POST + b"a: ", b"b" * 60_000),
    "requests": (b"", HEALTH * 1000),
    "requests without a key": (b"", POST + b"\r\n" + POST * 1000),
    "body": (CALL.replace(b": 15", b": 999999"), b" " * 60_000),
    "body over its limit": (CHUNKED + b"\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
}
#: Sent before the server must have hung up. What comes while earlier requests are answered is read and dropped.
MOST = 1 << 30


@pytest.mark.parametrize("kind", [kind for kind in ENDLESS if not kind.startswith("body")])
def test_what_never_ends(target: Target, kind: str) -> None:
    beginning, rest = ENDLESS[kind]
    with target.connect() as raw:
        raw.send(beginning)
        assert raw.flood(rest, MOST)
        assert set(raw.answers()) <= {200, 401, 431}


def test_bodies_that_are_held_are_bounded_together(target: Target) -> None:
    """Of six that lack their last byte four fit; small ones always come through, and what is answered makes room."""
    body = json.dumps({"prompt": "x" * ((1 << 20) - 100)}).encode()
    head = POST + KEY + JSON + b"content-length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as answered:
        uploads = [stack.enter_context(target.connect()) for _ in range(6)]
        for each in uploads:
            each.send(head + body[:-1])
            answered.register(each.socket, selectors.EVENT_READ, each)
        for _ in range(2):
            (key, _), *_ = answered.select(WAIT)
            refused: Raw = key.data
            status, headers, text = refused.answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(text)["type"].endswith("/too-many-bytes")
            answered.unregister(key.fileobj)
            uploads.remove(refused)
            refused.send(body[-1:])  # the rest is read, and the connection goes on
            refused.send(CALL)
            assert refused.answer()[0] == 200
        uploads[0].send(body[-1:])
        assert uploads[0].answer()[0] == 200
        with target.connect() as another:
            another.send(head + body)
            assert another.answer()[0] == 200
        for each in uploads[1:]:
            each.send(body[-1:])
            assert each.answer()[0] == 200


def test_requests_in_a_row_are_answered_in_order_up_to_a_number(target: Target) -> None:
    with target.connect() as raw:
        raw.send(HEALTH * limits.MAX_PIPELINED)
        assert [raw.answer()[0] for _ in range(limits.MAX_PIPELINED)] == [200] * limits.MAX_PIPELINED
    with target.connect() as raw:
        raw.send(CALL + HEALTH * (3 * limits.MAX_PIPELINED))
        assert raw.answers() == [200] * (limits.MAX_PIPELINED + 1)


def test_many_requests_in_a_row_with_long_heads(target: Target) -> None:
    """Each head is counted by itself, wherever the reads cut them."""
    head = HEALTH.replace(b"host", b"x-long: " + b"a" * 10_000 + b"\r\nhost")
    with target.connect() as raw:
        for _ in range(20):
            raw.send(head * 20)
            assert [raw.answer()[0] for _ in range(20)] == [200] * 20


# -- anything


PARTS = st.sampled_from(
    [CALL, CHUNKED + b"\r\n" + CHUNK + b"\r\n", HEALTH, POST, KEY, JSON, UPGRADE, CHUNK, X, b"\r\n", b"\r\n\r\n", b" ",
     b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n", b"expect: 100-continue\r\n", b"connection: close\r\n",
     b"GET ", b"HEAD ", b"/status", b"/stream", b"/readyz", b"/docs", b"/requests/x/cancel", b"HTTP/1.0", b"HTTP/1.1",
     b"\0", b"\xff", b"\n", b":", b"0\r\n", b"ffffffff\r\n", b"%ff", b"%2e", b"?since=1"]
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something that was a request before it was cut, doubled and overwritten."""
    data = bytearray(b"".join(draw(st.lists(PARTS | st.binary(max_size=8), min_size=1, max_size=6))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        until = draw(st.integers(at, min(len(data), at + 20)))
        data[at:until] = draw(PARTS | st.binary(max_size=8) | st.just(bytes(data[at:until] * 2)))
    return bytes(data)


@given(data=requests(), cut=st.integers(0, 400))
@examples(150)
def test_any_bytes_are_answered_or_hung_up_on(target: Target, data: bytes, cut: int) -> None:
    with target.connect() as raw:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.send(data[:cut])
            raw.send(data[cut:])
        with target.connect() as other:
            other.send(HEALTH)
            assert other.answer()[0] == 200
        with contextlib.suppress(OSError):
            raw.socket.shutdown(socket.SHUT_WR)
        assert all(status < 500 for status in answers_of(raw))


def answers_of(raw: Raw) -> list[int]:
    """Statuses of whole answers; the answer to HEAD has no body, and the last one may be cut."""
    with contextlib.suppress(ConnectionResetError):
        text = raw.file.read()
        assert not text or text.startswith(b"HTTP/1.1 ")
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", text)]
    return []
