"""Who else on this machine could reach, read or learn anything of a running app: all its processes, in every variant."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.linux

WAIT = 60.0
KEY = "audit-5f3a1c"
ADDRESS = "127.0.0.1"

REMOTE = """
import drumline
from drumline.distributed import DistributedRunner
from drumline.testing.workers import Echo


class Remote(drumline.App):
    async def setup(self):
        self.runner = DistributedRunner(Echo, world_size=2, device="cpu", worker_addr="127.0.0.1")
        await self.runner.start()

    @drumline.endpoint("/")
    async def call(self, payload: dict) -> dict:
        return await self.runner.invoke(payload)
"""


class Audited:
    """A server, and all processes below it."""

    def __init__(self, arguments: list[str], settings: dict[str, str], folder: Path) -> None:
        self.temp = folder / "temp"
        self.temp.mkdir(mode=0o755)
        self.shared_memory = set(os.listdir("/dev/shm"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRUMLINE_")}
        settings = {"DRUMLINE_API_KEYS": f'["{KEY}"]', "DRUMLINE_LOG_FORMAT": "json", **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "drumline", *arguments],
            stdout=subprocess.PIPE,
            cwd=folder,
            umask=0,  # what somebody's shell or image has: our own modes must not depend on it
            env={**inherited, **settings, "TMPDIR": str(self.temp)},
        )
        self._rest = threading.Thread(target=self._read)
        self._ready = threading.Event()
        self.port = 0
        self._rest.start()
        assert self._ready.wait(WAIT)
        assert self.port, self.process.wait()
        assert self.call(KEY) == 200  # so that all connections between the ranks are made
        self.server = psutil.Process(self.process.pid)
        self.below = self.server.children(recursive=True)
        assert len(self.below) >= 3  # the nursery and two ranks

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                record = json.loads(line)
                if record["message"].startswith("ready: "):
                    self.port = int(record["url"].rpartition(":")[2])
                    self._ready.set()
        self._ready.set()

    def call(self, key: str) -> int:
        with contextlib.closing(HTTPConnection(ADDRESS, self.port, timeout=WAIT)) as client:
            body = json.dumps({"x": "y" * 300_000})  # by shared memory, too
            client.request("POST", "/", body, {"Content-Type": "application/json", "X-API-Key": key})
            answer = client.getresponse()
            answer.read()
            return answer.status

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(WAIT) == 0
        finally:
            self.process.kill()
            self._rest.join()


#: The command, its settings, and whether it is bound to loopback only.
VARIANTS: dict[str, tuple[list[str], dict[str, str], bool]] = {
    "on a laptop": (["run", "drumline.testing.workers:Echo", "-n", "2", "-p", "0"], {}, True),
    "in a pod": (
        ["serve"],
        {
            "DRUMLINE_TARGET": "drumline.testing.workers:Echo",
            "DRUMLINE_WORLD_SIZE": "2",
            "DRUMLINE_DEVICE": "cpu",
            "DRUMLINE_HOST": "0.0.0.0",
            "DRUMLINE_PORT": "0",
            "DRUMLINE_DRAIN_DELAY": "0",
        },
        False,
    ),
    "over ZeroMQ": (["run", "remote.py", "-p", "0"], {}, True),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def audited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    arguments, settings, _ = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("audit")
    (folder / "remote.py").write_text(REMOTE)
    made = Audited(arguments, settings, folder)
    try:
        yield made
    finally:
        made.close()
    assert os.listdir(made.temp) == []


def bound(process: psutil.Process) -> list[tuple[str, int]]:
    """Addresses that others could send to: listening sockets, and all that take datagrams."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]


def test_only_the_http_port_is_open_to_others(audited: Audited, request: pytest.FixtureRequest) -> None:
    loopback_only = VARIANTS[request.node.callspec.params["audited"]][2]
    mine = bound(audited.server)
    assert [port for _, port in mine].count(audited.port) == 1
    for address, port in mine:
        assert ipaddress.ip_address(address).is_loopback or (port == audited.port and not loopback_only)
    for process in audited.below:
        for address, _ in bound(process):
            assert ipaddress.ip_address(address).is_loopback, process.cmdline()


def test_no_process_below_holds_a_socket_of_clients(audited: Audited) -> None:
    """Neither the listening one nor a connection: a rank could answer, or keep the port from the next server."""
    held = set(sockets(audited.server.pid, "tcp")) | set(sockets(audited.server.pid, "tcp6"))
    for process in audited.below:
        assert not held & set(links(process.pid))


def sockets(pid: int, kind: str) -> list[str]:
    """``socket:[inode]`` of what a process holds of this kind."""
    inodes = {line.split()[9] for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]}
    return [link for link in links(pid) if link.removeprefix("socket:[").removesuffix("]") in inodes]


def links(pid: int) -> list[str]:
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def test_unix_sockets_have_no_name(audited: Audited) -> None:
    """One with a path, or an abstract name, could be connected to."""
    for process in [audited.server, *audited.below]:
        assert [c.laddr for c in process.net_connections("unix") if c.laddr] == []


def test_files_are_in_a_private_folder(audited: Audited) -> None:
    made = list(audited.temp.iterdir())
    assert made
    for path in made:
        assert stat.S_ISDIR(path.stat().st_mode), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
        assert path.stat().st_uid == os.getuid()
    # Whatever else is open for writing lies there, or has no name.
    for process in [audited.server, *audited.below]:
        for opened in process.open_files():
            if opened.mode != "r" and "(deleted)" not in opened.path:
                assert Path(opened.path).is_relative_to(audited.temp) or opened.path.startswith("/dev/"), opened


def test_shared_memory_is_for_its_owner_only(audited: Audited) -> None:
    for name in set(os.listdir("/dev/shm")) - audited.shared_memory:
        with contextlib.suppress(FileNotFoundError):  # a neighbour's
            assert stat.S_IMODE(os.stat(f"/dev/shm/{name}").st_mode) & 0o077 == 0, name


def test_keys_are_with_the_server_alone(audited: Audited) -> None:
    """Not in the environment of ranks, which run users' code and its dependencies; in nobody's command line."""
    assert KEY in Path(f"/proc/{audited.server.pid}/environ").read_text()
    for process in audited.below:
        assert KEY not in Path(f"/proc/{process.pid}/environ").read_text()
        assert "DRUMLINE_API_KEYS" not in Path(f"/proc/{process.pid}/environ").read_text()
    for process in [audited.server, *audited.below]:
        assert KEY not in " ".join(process.cmdline())
    assert audited.call("wrong") == 401
