"""Other processes of a bench: servers that are waited for, and the load client."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@dataclass
class Load:
    """What the load client saw.

    Attributes:
        latencies: seconds per request, in the order of the answers.
        served: answers per connection.
        seconds: length of the measured time.
        delays: for streams, seconds from the sending of each update to its arrival.
        firsts: for streams, seconds from the request to its first update.
    """

    latencies: list[float]
    served: list[int]
    seconds: float
    delays: list[float]
    firsts: list[float]

    @property
    def per_second(self) -> float:
        """Answers a second, all connections together."""
        return sum(self.served) / self.seconds


@dataclass
class OpenLoad:
    """What the open-loop client saw.

    Attributes:
        sent: requests.
        seconds: from the first request to the last answer.
        latencies: by status, seconds per answer, from when the request was due.
    """

    sent: int
    seconds: float
    latencies: dict[int, list[float]]


@dataclass(frozen=True)
class Http:
    """A server on a port of this machine."""

    port: int

    def wait_until_up(self, process: subprocess.Popen[bytes], path: str = "/readyz", timeout: float = 120) -> None:
        """Return when ``GET path`` answers 200.

        Raises:
            RuntimeError: the process ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=35)
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
                if answer.status == 200:
                    return
                # Up, but not ready: the server tells when its status has changed.
                version = json.loads(body).get("version", 0)
                connection.request("GET", f"/status?since={version}")
                connection.getresponse().read()
            except (ConnectionError, ValueError):
                try:  # not listening yet: the process's end is the only thing that can be waited for
                    code = process.wait(timeout=0.02)
                except subprocess.TimeoutExpired:
                    continue
                raise RuntimeError(f"{process.args!r} ended with {code}") from None
            finally:
                connection.close()
        raise RuntimeError(f"no answer from port {self.port} in {timeout} s")

    def wait_until_serving(self, process: subprocess.Popen[bytes], path: str, timeout: float) -> None:
        """Return when ``POST path`` answers 200; for servers that have no readiness of ours.

        Raises:
            RuntimeError: the process ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
                connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    return
            except (ConnectionError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            try:  # nothing tells when another's server is ready, so it is asked; its end is noticed at once
                code = process.wait(timeout=0.02)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"{process.args!r} ended with {code}")
        raise RuntimeError(f"no answer from port {self.port} in {timeout} s")

    @contextmanager
    def visited(self, path: str) -> Iterator[bytes]:
        """``GET path`` on a connection that stays open inside of the block; gives the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=35)
        try:
            connection.request("GET", path)
            yield connection.getresponse().read()
        finally:
            connection.close()

    async def load(self, body: dict[str, Any], *, connections: int = 1, path: str = "/", **options: float) -> Load:
        """Run the load client in its own process; ``options`` are its ``--requests``, ``--seconds``, ``--warmup``."""
        command = [sys.executable, "-m", "bench.http_load", "--port", str(self.port), "--path", path]
        command += ["--connections", str(connections), "--body", json.dumps(body)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        return Load(**await _output(command))

    async def open_load(self, body: dict[str, Any], *, rate: float, seconds: float, path: str = "/") -> OpenLoad:
        """Run the open-loop client in its own process: ``rate`` requests a second for ``seconds``."""
        command = [sys.executable, "-m", "bench.open_load", "--port", str(self.port), "--path", path]
        command += ["--rate", str(rate), "--seconds", str(seconds), "--body", json.dumps(body)]
        seen = await _output(command)
        by_status = {int(status): latencies for status, latencies in seen["latencies"].items()}
        return OpenLoad(seen["sent"], seen["seconds"], by_status)


@dataclass(frozen=True)
class Served(Http):
    """A server of ours, or a floor's.

    Attributes:
        process: its first process.
    """

    process: subprocess.Popen[bytes]


async def _output(command: list[str]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load client failed with {process.returncode}")
    seen: dict[str, Any] = json.loads(out)
    return seen


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started, itself first."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
