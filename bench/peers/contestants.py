"""Who is compared: how each is started, and what one should know to read its figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.peers.environments import ROOT, python_of
from bench.processes import Http, free_port

_SERVERS = "bench.peers.servers"
_START_SECONDS = 180.0
_STOP_SECONDS = 30.0
#: How much of what a server said is shown when it does not serve.
_LINES = 20


@dataclass(frozen=True)
class Contestant:
    """A server with the work behind it.

    Attributes:
        name: for tables and ``--only``.
        module: the program under ``bench/peers/servers`` ("" for ours, which is started by its own command).
        requirements: its environment; None: the project's.
        ranks: processes that each get every request; 0: none, the work is done in the server itself.
        settings: what was set, and why, beside the defaults.
        arguments: of the program; ``{port}`` is filled in.
        environment: variables for the program.
        path: where it takes requests.
    """

    name: str
    module: str
    requirements: str | None
    ranks: int
    settings: str
    arguments: tuple[str, ...] = ("{port}",)
    environment: dict[str, str] = field(default_factory=dict)
    path: str = "/"

    def command(self, port: int) -> list[str]:
        """Return the command line."""
        if not self.module:
            drumline = str(Path(sys.executable).with_name("drumline"))
            worker = str(Path(__file__).parent / "servers" / "ours.py")
            return [drumline, "run", f"{worker}:Worker", "-n", str(self.ranks), "--device", "cpu", "--port", str(port)]
        arguments = [argument.format(port=port) for argument in self.arguments]
        return [python_of(self.requirements), "-m", f"{_SERVERS}.{self.module}", *arguments]


_OURS = {"DRUMLINE_LOG_LEVEL": "warning", "DRUMLINE_DRAIN_DELAY": "0", "DRUMLINE_MAX_QUEUE_DEPTH": "1024"}

CONTESTANTS = (
    Contestant("floor", "bare", None, 0, "FastAPI on uvicorn with uvloop and httptools; the work in its own process"),
    Contestant("drumline", "", None, 2, "drumline run -n 2, access log off, a queue of 1024 (mosec's default)",
               environment=_OURS),
    Contestant("drumline-1", "", None, 1, "the same with one rank, as a measure for those without groups",
               environment=_OURS),
    Contestant("pipes", "spawn_server", None, 2, "FastAPI, torch.multiprocessing, one Pipe and one thread per rank"),
    Contestant("fal", "fal_server", "fal", 2,
               "fal.distributed behind FastAPI; nccl and cuda replaced by gloo and cpu inside its ranks"),
    Contestant("ray", "ray_server", "ray", 2, "RAY_SERVE_THROUGHPUT_OPTIMIZED=1, RAY_SERVE_ENABLE_HA_PROXY=1, no access log",
               environment={"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1",
                            "RAY_USAGE_STATS_ENABLED": "0"}),
    Contestant("mosec", "mosec_server", "mosec", 1, "one worker (it has no groups), log level error",
               ("--address", "127.0.0.1", "--port", "{port}", "--log-level", "error", "--capacity", "1024"),
               path="/invoke"),
    Contestant("litserve", "litserve_server", "litserve", 1, "one worker (it has no groups), fast_queue, restart_workers"),
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A contestant that answers."""

    contestant: Contestant
    http: Http
    process: psutil.Process

    def family(self) -> list[psutil.Process]:
        """Return the processes that belong to it, itself first."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> int:
        """Return the bytes that would go with it: the unique set size of all its processes."""
        return sum(_uss(process) for process in self.family())


def _uss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


@contextmanager
def running(contestant: Contestant) -> Iterator[Running]:
    """Start a contestant, wait until it answers a request, and stop it with all that it started.

    Raises:
        RuntimeError: it does not serve; with the last lines that it said.
    """
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **contestant.environment}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            contestant.command(port), env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT
        )
        handle = psutil.Process(process.pid)
        try:
            http = Http(port)
            try:
                http.wait_until_serving(process, contestant.path, timeout=_START_SECONDS)
            except RuntimeError as error:
                said.seek(0)
                lines = said.read().decode(errors="replace").splitlines()[-_LINES:]
                raise RuntimeError("\n".join([f"{contestant.name} does not serve: {error}", *lines])) from None
            yield Running(contestant, http, handle)
        finally:
            _stop(process, handle)


def _stop(process: subprocess.Popen[bytes], handle: psutil.Process) -> None:
    family: list[psutil.Process] = []
    if process.poll() is None:
        family = handle.children(recursive=True)
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=_STOP_SECONDS)
