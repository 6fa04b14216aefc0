"""A call that comes in one piece has no task of its own: whoever sends it gets what one that comes in pieces gets."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from drumline import codec
from drumline.server import limits
from drumline.server.connections import Connection
from drumline.server.exchange import Exchange
from drumline.testing.answers import metric_of
from drumline.testing.serving import Server, running, service_for

TARGET = "drumline.testing.served:Served"
KEY = {"authorization": "Key k"}
LARGE = limits.AT_ONCE_BYTES + 1
#: By name: what is asked, and the headers it is asked with.
CALLS: dict[str, tuple[dict[str, Any] | bytes, dict[str, str]]] = {
    "a result": ({"prompt": "x"}, {}),
    "a result in two writes": ({"prompt": "x", "mode": "large", "result_bytes": limits.CHUNK_BYTES}, {}),
    "a result for a thread": ({"prompt": "x", "mode": "large", "result_bytes": 3 << 20}, {}),
    "no JSON": (b'{"prompt": }', {}),
    "no payload of the worker": ({"prompt": 3, "more": 1}, {}),
    "a reserved name": ({"prompt": "x", "streaming": True}, {}),
    "no JSON for its result": ({"prompt": "x", "mode": "nan"}, {}),
    "an error": ({"prompt": "x", "how": "raise"}, {}),
    "no time": ({"prompt": "x", "steps": 1_000_000, "seconds": 0.01}, {"x-request-timeout": "0.05"}),
    "a wrong time": ({"prompt": "x"}, {"x-request-timeout": "soon"}),
    "no key": ({"prompt": "x"}, {"authorization": "Key wrong"}),
    "no media type": ({"prompt": "x"}, {"content-type": "text/plain"}),
    "an encoding": ({"prompt": "x"}, {"content-encoding": "gzip"}),
}
#: By name: how it comes.
WAYS = ("whole", "chunked", "head first", "large", "last", "by id", "http/1.0")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    target = "drumline.testing.served:Served"
    with running(
        lambda: service_for(target, max_body_bytes=1 << 20, api_keys=["k"], namespace="me", name="app")
    ) as made:
        yield made


class Client:
    """One connection, and all answers on it."""

    def __init__(self, server: Server, receive_buffer: int = 0) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((host, int(port)))
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self) -> tuple[int, dict[str, str]]:
        status, headers = int(self.file.readline().split()[1]), {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return status, headers

    def answer(self) -> tuple[int, dict[str, str], Any]:
        status, headers = self.head()
        return status, headers, json.loads(self.file.read(int(headers["content-length"])))


def request(asked: dict[str, Any] | bytes, headers: dict[str, str], way: str = "whole") -> tuple[bytes, bytes]:
    """Return head and body of ``POST /``."""
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    if way == "large":
        body += b" " * LARGE
    sent = {
        "host": "x",
        "authorization": "Key k",
        "content-type": "application/json",
        "x-request-id": "mine",
        **headers,
    }
    if way in ("head first", "last"):
        sent |= {"expect": "100-continue"} if way == "head first" else {"connection": "close"}
    length = {"transfer-encoding": "chunked"} if way == "chunked" else {"content-length": str(len(body))}
    if way == "chunked":
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    path, version = "/me/app" if way == "by id" else "/", "1.0" if way == "http/1.0" else "1.1"
    lines = [f"POST {path} HTTP/{version}", *(f"{name}: {value}" for name, value in (sent | length).items())]
    return "\r\n".join([*lines, "", ""]).encode(), body


def asked_in(server: Server, name: str, way: str) -> tuple[int, dict[str, str], Any]:
    head, body = request(*CALLS[name], way)
    with Client(server) as client:
        if way == "head first":
            client.send(head)
            status, headers = client.head()
            if status != 100:  # refused for its head
                return status, headers, json.loads(client.file.read(int(headers["content-length"])))
            client.send(body)
        else:
            client.send(head + body)
        return client.answer()


def status_of(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = httpx2.get(f"{server.url}/status", headers=KEY).json()
    return answer


def until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 20


def a_runs_and_b_waits(server: Server, first: Client, other: Client) -> None:
    """Send request ``a``, then ``b``; the ranks go on when both are where they belong."""
    ranks = [each["pid"] for each in status_of(server)["ranks"]]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        for client, name, where in ((first, "a", "inFlight"), (other, "b", "queueDepth")):
            client.send(b"".join(request({"prompt": name}, {"x-request-id": name})))
            until(lambda where=where: status_of(server)[where] == 1)
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)


def counted(server: Server) -> dict[str, float]:
    """How often a call ended how, as far as metrics tell."""
    text = httpx2.get(f"{server.url}/metrics", headers=KEY).text
    names = [line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("drumline_requests_total{")]
    waits = (
        "drumline_request_duration_seconds_count",
        "drumline_queue_wait_seconds_count",
        "drumline_requests_in_flight",
    )
    return {name: metric_of(text, name) for name in (*names, *waits)}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_answer_however_it_comes(server: Server, name: str) -> None:
    answers, counts = {}, {}
    for way in WAYS:
        before = counted(server)
        status, headers, body = asked_in(server, name, way)
        after = counted(server)
        del headers["date"]
        headers.pop("connection", None)  # of those that are the last
        answers[way] = (status, headers, body)
        counts[way] = {
            each: after[each] - before.get(each, 0.0) for each in after if after[each] != before.get(each, 0.0)
        }
    assert all(answer == answers["whole"] for answer in answers.values()), answers
    assert all(count == counts["whole"] for count in counts.values()), counts


def test_requests_of_one_piece_are_answered_in_order_on_one_connection(server: Server) -> None:
    """Also when some of them need a task, and when the last has its body still to come."""
    names = ("a result", "no JSON", "a result for a thread", "a result", "an error", "a result")
    pieces = [b"".join(request(*CALLS[name])) for name in names]
    head, body = request({"prompt": "the last"}, {})
    with Client(server) as client:
        client.send(b"".join(pieces) + head)
        alone = [asked_in(server, name, "whole")[2] for name in names]
        client.send(body)
        assert [client.answer()[2] for _ in names] == alone
        assert client.answer()[2]["prompt"] == "the last"


def test_a_client_that_leaves_cancels_its_call(server: Server) -> None:
    name = 'drumline_requests_total{outcome="cancelled"}'
    before = counted(server).get(name, 0.0)
    with Client(server) as client:
        client.send(b"".join(request({"prompt": "x", "steps": 1_000_000, "seconds": 0.01}, {})))
        until(lambda: status_of(server)["inFlight"] == 1)
    assert asked_in(server, "a result", "whole")[0] == 200  # it would wait for ever behind the other
    assert counted(server)[name] == before + 1


def test_answers_wait_for_a_client_that_reads_slowly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody takes do not pile up in the server: who has not read the last gets no other."""
    seen: list[tuple[bool, bool]] = []
    full = threading.Event()
    answer: Callable[[Connection, int, bytes, bytes], bool] = Connection.answer

    def observed(self: Connection, status: int, headers: bytes, body: bytes) -> bool:
        paused = self.flow.write_paused
        seen.append((paused, answer(self, status, headers, body)))
        if paused:
            full.set()
        return seen[-1][1]

    monkeypatch.setattr(Connection, "answer", observed)
    large = {"prompt": "x", "mode": "large", "result_bytes": limits.CHUNK_BYTES - 1000}
    pieces = [b"".join(request({**large, "prompt": str(n)}, {})) for n in range(limits.MAX_PIPELINED)]
    with Client(server, receive_buffer=4096) as client:
        client.send(b"".join(pieces))
        assert full.wait(60), seen
        assert (True, True) not in seen
        assert [client.answer()[2]["prompt"] for _ in pieces] == [str(n) for n in range(len(pieces))]
    assert all(sent is not paused for paused, sent in seen)


def test_the_next_call_is_with_the_ranks_before_the_last_is_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server writes while the ranks work."""
    story: list[str] = []
    answer: Callable[[Connection, int, bytes, bytes], bool] = Connection.answer
    runner: Any = server.service.runner
    engine = runner._engine
    send = engine._send

    def observed(self: Connection, status: int, headers: bytes, body: bytes) -> bool:
        story.append(f"answered {json.loads(body)['prompt']}")
        return answer(self, status, headers, body)

    def sent(effect: Any) -> None:
        story.append(f"sent {engine.tickets[effect.number].request_id}")
        send(effect)

    monkeypatch.setattr(Connection, "answer", observed)
    monkeypatch.setattr(engine, "_send", sent)
    with Client(server) as first, Client(server) as other:
        a_runs_and_b_waits(server, first, other)
        assert first.answer()[0] == other.answer()[0] == 200
    assert story == ["sent a", "sent b", "answered a", "answered b"]


@pytest.mark.parametrize("way", WAYS)
def test_no_way_around_the_limit(way: str) -> None:
    """Also for limits that are smaller than what is taken at once."""
    with running(lambda: service_for(TARGET, world_size=1, max_body_bytes=1000, namespace="me", name="app")) as server:
        head, body = request({"prompt": "x" * 2000}, {}, way)
        with Client(server) as client:
            client.send(head + body)
            assert client.answer()[0] == 413
        httpx2.post(server.url, json={"prompt": "x"}).raise_for_status()


@pytest.mark.parametrize("namespace", ["docs", "requests", "mine"])
def test_a_namespace_with_a_name_of_the_servers(namespace: str) -> None:
    with running(lambda: service_for(TARGET, world_size=1, namespace=namespace, name="app")) as server:
        found = []
        for way in ("whole", "head first"):
            head, body = request({"prompt": "x"}, {}, way)
            head = head.replace(b"POST / ", b"POST /%b/app " % namespace.encode())
            with Client(server) as client:
                client.send(head + (body if way == "whole" else b""))
                status, headers = client.head()
                if status == 100:
                    client.send(body)
                    status, headers = client.head()
                found.append((status, headers["content-type"]))
        assert found[0] == found[1]
        assert (found[0][0] == 200) is (namespace == "mine")


def test_a_result_is_encoded_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is too large, or its connection not such, for being sent at once."""
    encoded: list[int] = []
    encode = codec.to_json

    def counted_encode(*args: Any) -> bytes:
        encoded.append(1)
        return encode(*args)

    monkeypatch.setattr(codec, "to_json", counted_encode)
    for name in ("a result", "a result in two writes", "a result for a thread"):
        for way in WAYS:
            encoded.clear()
            assert asked_in(server, name, way)[0] == 200
            assert encoded == [1], (name, way)


@pytest.mark.parametrize("name", ["a result", "no payload of the worker", "no key", "an error"])
def test_nothing_of_a_request_is_left_to_the_garbage_collector(server: Server, name: str) -> None:
    """Its payload may be large, and the collector does not count bytes."""
    head, body = request(*CALLS[name])
    gc.collect()
    gc.disable()
    try:
        with Client(server) as client:
            for _ in range(5):
                client.send(head + body)
                client.answer()
            until(lambda: sum(isinstance(each, Exchange) for each in gc.get_objects()) == 0)
    finally:
        gc.enable()


def test_what_goes_wrong_with_the_next_call_keeps_no_answer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"world_size": 1, "cancel_grace": 0.1, "drain_timeout": 0.1}
    with running(lambda: service_for(TARGET, **settings)) as server, Client(server) as first, Client(server) as other:
        runner: Any = server.service.runner
        send = runner._engine._send

        def sent(effect: Any) -> None:
            if runner._engine.tickets[effect.number].request_id == "b":
                raise RuntimeError("on purpose")
            send(effect)

        monkeypatch.setattr(runner._engine, "_send", sent)
        a_runs_and_b_waits(server, first, other)
        assert first.answer()[2]["prompt"] == "a"
