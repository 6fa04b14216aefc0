"""The container's process: SIGTERM drains it, a second one does not wait, TLS, ports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError
from drumline.problems import TYPE_PREFIX
from drumline.server.serve import serve
from drumline.server.service import Service
from drumline.testing.answers import events_of, problem_of
from drumline.testing.serving import running, service_for

TARGET = "drumline.testing.served:Served"
LONG = {"prompt": "long", "steps": 5000, "seconds": 0.02}

PROGRAM = """
import json, sys
from drumline.server.serve import run
from drumline.testing.serving import service_for

ended = run(
    service_for(**json.loads(sys.argv[1])),
    on_bound=lambda url: print(url, flush=True),
    on_ready=lambda: print("ready", flush=True),
)
print(type(ended.error).__name__, ended.signal, ended.forced, flush=True)
sys.exit(1 if ended.error else 0)
"""


APP_PROGRAM = """
import json, sys
import drumline
from drumline.contract import RunnerSettings
from drumline.distributed import DistributedRunner
from drumline.server.apps import app_service
from drumline.server.serve import run
from starlette.responses import StreamingResponse

class Demo(drumline.App):
    async def setup(self):
        self.runner = DistributedRunner("drumline.testing.served:Served", 2, device="cpu")
        await self.runner.start()

    def teardown(self):
        print("teardown", flush=True)

    def handle_exit(self):
        print("exit", flush=True)

    @drumline.endpoint("/twice")
    async def twice(self, payload: dict) -> dict:
        return [await self.runner.invoke(payload), await self.runner.invoke(payload)][1]

    @drumline.endpoint("/stream")
    async def stream(self, payload: dict) -> StreamingResponse:
        events = self.runner.stream(payload, as_text_events=True)
        return StreamingResponse(events, media_type="text/event-stream")

settings = json.loads(sys.argv[1])
settings.pop("target")
ended = run(
    app_service(Demo(), RunnerSettings(port=0, **settings)),
    on_bound=lambda url: print(url, flush=True),
    on_ready=lambda: print("ready", flush=True),
)
print(type(ended.error).__name__, ended.signal, ended.forced, flush=True)
sys.exit(1 if ended.error else 0)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self._lines = iter(process.stdout)
        self.url = self.line()
        assert self.line() == "ready"
        self.client = httpx2.Client(base_url=self.url, timeout=30)

    def line(self) -> str:
        return next(self._lines).strip()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait_for_state(self, state: str) -> None:
        status = self.client.get("/status").json()
        while status["state"] != state:
            status = self.client.get("/status", params={"since": status["version"]}).json()

    def stream(self, payload: Any) -> Stream:
        return Stream(self.client, payload)


class Stream(threading.Thread):
    """Reads a stream to its end; ``begun`` is set with its first event."""

    def __init__(self, client: httpx2.Client, payload: Any) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.text = ""
        self._client, self._payload = client, payload
        self.start()

    def run(self) -> None:
        with self._client.stream("POST", "/stream", json=self._payload) as answer:
            for chunk in answer.iter_text():
                self.text += chunk
                self.begun.set()


@contextmanager
def process(program: str = PROGRAM, **settings: Any) -> Iterator[Process]:
    arguments = json.dumps({"target": TARGET, **settings})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", program, arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        made = None
        try:
            made = Process(child)
            yield made
        finally:
            if made is not None:
                made.client.close()
            if child.poll() is None:
                child.kill()


def test_sigterm_lets_requests_finish() -> None:
    with process(drain_delay=1.0, drain_timeout=30) as server:
        stream = server.stream({"prompt": "x", "steps": 40, "seconds": 0.05})
        assert stream.begun.wait(10)
        server.signal()
        server.wait_for_state("draining")
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").status_code == 200
        # Endpoints are still being taken out of load balancers: calls that come now are served.
        assert server.client.post("/", json={"prompt": "late"}).json()["prompt"] == "late"
        stream.join()
        assert events_of(stream.text)[-1][:2] == ("result", 40)
        assert server.line() == f"NoneType {int(signal.SIGTERM)} False"
        assert server.process.wait(10) == 0


def test_sigterm_ends_what_does_not_finish_with_its_terminal_event() -> None:
    with process(drain_delay=0.0, drain_timeout=0.5) as server:
        stream = server.stream(LONG)
        assert stream.begun.wait(10)
        server.signal(signal.SIGINT)
        stream.join()
        name, _, problem = events_of(stream.text)[-1]
        assert (name, problem["type"]) == ("error", TYPE_PREFIX + "draining")
        assert server.line() == f"NoneType {int(signal.SIGINT)} False"
        assert server.process.wait(10) == 0


def test_calls_are_refused_once_draining() -> None:
    with process(drain_delay=0.0, drain_timeout=30) as server:
        stream = server.stream({"prompt": "x", "steps": 60, "seconds": 0.05})
        assert stream.begun.wait(10)
        server.signal()
        server.wait_for_state("draining")
        problem_of(server.client.post("/", json={"prompt": "x"}), "draining")
        problem_of(server.client.post("/stream", json={"prompt": "x"}), "draining")
        stream.join()
        assert events_of(stream.text)[-1][0] == "result"
        assert server.process.wait(10) == 0


def test_second_signal_does_not_wait() -> None:
    with process(drain_delay=600.0, drain_timeout=600.0, cancel_grace=600.0) as server:
        stream = server.stream({"prompt": "x", "steps": 1, "how": "hang", "rank": 1})
        assert stream.begun.wait(10)
        server.signal()
        server.wait_for_state("draining")
        server.signal()
        assert server.line() == f"NoneType {int(signal.SIGTERM)} True"
        assert server.process.wait(10) == 0
        stream.join()


def test_an_app_finishes_its_calls_and_is_torn_down() -> None:
    with process(APP_PROGRAM, drain_delay=0.0, drain_timeout=30) as server:
        stream = server.stream({"prompt": "x", "steps": 40, "seconds": 0.05})
        assert stream.begun.wait(10)
        # The second half of this call is submitted while the server drains.
        with ThreadPoolExecutor(1) as pool:
            twice = pool.submit(server.client.post, "/twice", json={"prompt": "both"})
            while server.client.get("/status").json()["queueDepth"] == 0:
                pass
            server.signal()
            server.wait_for_state("draining")
            problem_of(server.client.post("/twice", json={"prompt": "x"}), "draining")
            assert twice.result().json()["prompt"] == "both"
        stream.join()
        assert events_of(stream.text)[-1][:2] == ("result", 40)
        assert [server.line(), server.line()] == ["exit", "teardown"]
        assert server.line() == f"NoneType {int(signal.SIGTERM)} False"
        assert server.process.wait(10) == 0


def test_a_cancelled_server_leaves_nothing() -> None:
    async def main(until_ready: bool) -> None:
        bound, ready = asyncio.Event(), asyncio.Event()
        made = serve(service_for(TARGET), on_bound=lambda _: bound.set(), on_ready=ready.set, handle_signals=False)
        task = asyncio.create_task(made)
        await (ready if until_ready else bound).wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for until_ready in (True, False):
        asyncio.run(main(until_ready))


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    authority.cert_pem.write_to_path(str(ca))
    files = {"tls_cert": str(cert), "tls_key": str(key)}
    with running(lambda: service_for(TARGET, world_size=1, host="localhost", **files)) as server:
        assert server.url.startswith("https://localhost:")
        context = ssl.create_default_context(cafile=str(ca))
        with httpx2.Client(base_url=server.url, verify=context, timeout=30) as client:
            assert client.post("/", json={"prompt": "x"}).json()["prompt"] == "x"
            assert events_of(client.post("/stream", json={"prompt": "x"}).text)[-1][0] == "result"


def nothing_served(**settings: Any) -> Service:
    async def nothing() -> None: ...

    return Service(RunnerSettings(**settings), start=nothing, stop=nothing)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_cert": "/nowhere/cert.pem"}, "cert.pem cannot be used"),
        ({"tls_key": "/nowhere/key.pem"}, "tls_key is set without tls_cert"),
        ({"host": "192.0.2.1"}, "choose another with --host"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_bound_names_the_cure(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        asyncio.run(serve(nothing_served(port=0, **settings)))


def test_port_that_is_taken_names_the_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{port}.*--port"):
            asyncio.run(serve(nothing_served(port=port)))


def test_signals_need_the_main_thread() -> None:
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(serve(nothing_served(port=0)))
        except ConfigurationError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])
