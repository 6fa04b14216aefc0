"""What `helm test` runs, against a server that nobody reaches at first."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "charts/drumline/files/call.py"


class App(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(HTTPServer):
    #: Linux takes one connection more than this; packets of others are dropped.
    request_queue_size = 0


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("call", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), App) as made:
        yield made


@contextmanager
def stopped(server: Server) -> Iterator[threading.Thread]:
    """A thread that serves once it is started, until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    try:
        yield thread
    finally:
        if thread.ident:
            server.shutdown()
            thread.join(30)


def test_a_connection_that_gets_nowhere_is_begun_anew(
    program: ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node's packets before its rules for a new Service are there: dropped, for as long as that connection lives."""
    tries: list[float] = []
    monkeypatch.setattr(program, "CONNECT_SECONDS", 0.2)
    with socket.create_connection(server.server_address) as waiting, stopped(server) as serving:

        def pause(seconds: float) -> None:
            tries.append(seconds)
            if len(tries) == 1:
                waiting.close()
                serving.start()

        monkeypatch.setattr(program.time, "sleep", pause)
        assert program.call(f"http://127.0.0.1:{server.server_port}") == {"value": program.VALUE}
    assert tries, "the first connection was to be dropped"


def test_who_answers_with_an_error_is_not_asked_again(
    program: ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(App, "do_POST", lambda self: self.send_error(503, "later"))
    with stopped(server) as serving:
        serving.start()
        with pytest.raises(program.Failed, match="503"):
            program.call(f"http://127.0.0.1:{server.server_port}")
