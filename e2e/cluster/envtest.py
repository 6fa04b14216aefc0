"""etcd and the API server alone, for tests that need the real API but no pods. Linux or macOS, no root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from . import pins
from .api import Api
from .components import GO_SETTINGS, api_server_flags, etcd_flags
from .errors import ClusterError
from .pki import ADMINISTRATORS, Authority, write_private
from .store import Store
from .waiting import tail, wait_for

HOST = "127.0.0.1"
SERVICES = "10.0.0.0/16"
LIMIT = 120.0
#: Free ports can be taken by somebody else before our process listens on them.
ATTEMPTS = 3


def programs(store: Store, environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The binaries: those in `$KUBEBUILDER_ASSETS`, else our own, which are built if they are not there yet.

    Raises:
        ClusterError: `$KUBEBUILDER_ASSETS` lacks one, or a build failed.
    """
    if assets := environment.get("KUBEBUILDER_ASSETS"):
        found = {name: Path(assets) / name for name in pins.ENVTEST_PROGRAMS}
        if missing := [name for name, path in found.items() if not os.access(path, os.X_OK)]:
            raise ClusterError(f"KUBEBUILDER_ASSETS={assets} has no {' and no '.join(missing)}; fix it or unset it")
        return found
    store.ensure(pins.ENVTEST_PROGRAMS)
    return {name: store.program(name) for name in pins.ENVTEST_PROGRAMS}


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses now."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _serves(api: Api) -> bool:
    """Whether it is ready, and has made the namespace that most calls go to: it says so before."""
    return api.ready() and any(item["metadata"]["name"] == "default" for item in api.get("/api/v1/namespaces")["items"])


class EnvTest:
    """An API server for the duration of a `with` block; several can run side by side.

    Args:
        store: Where its programs are.
        report: Told how long it took.
        flags: More for the API server, such as `--audit-log-path=...`.

    Attributes:
        kubeconfig: The administrator's.
        url: Of the API server.
    """

    def __init__(
        self, store: Store | None = None, report: Callable[[str], None] = lambda _: None, flags: Sequence[str] = ()
    ) -> None:
        self._store = store or Store()
        self._report = report
        self._flags = flags
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._directory = Path()
        self._ports: tuple[int, int, int] = (0, 0, 0)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self._directory / "kubeconfig"

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return f"https://{HOST}:{self._ports[2]}"

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl and tests reach it."""
        # kubectl's own cache would go to the home directory.
        ours = {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(self._directory / "kubectl-cache")}
        return os.environ | ours

    def api(self) -> Api:
        """A connection as its administrator."""
        return Api(HOST, self._ports[2], self._directory / "pki")

    def log(self, component: str) -> Path:
        """What `etcd` or `kube-apiserver` prints."""
        return self._directory / f"{component}.log"

    def __enter__(self) -> Self:
        binaries = programs(self._store)
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._start(binaries)
                break
            except ClusterError as error:
                self.stop()
                if attempt == ATTEMPTS or "address already in use" not in str(error):
                    raise
            except BaseException:
                self.stop()
                raise
        self._report(f"API server ready at {self.url} in {time.monotonic() - started:.2f} s")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, binaries: Mapping[str, Path]) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="drumline-envtest-"))
        pki = self._directory / "pki"
        authority = Authority(pki)
        client, peer, secure = self._ports = tuple(free_ports(3))  # type: ignore[assignment]
        authority.issue("apiserver", "kube-apiserver", hosts=["localhost", HOST, "10.0.0.1"])
        authority.issue("admin", "admin", ADMINISTRATORS)
        authority.issue_service_account_keys()
        write_private(self.kubeconfig, authority.kubeconfig("admin", self.url))
        etcd_url = f"http://{HOST}:{client}"
        etcd = etcd_flags(str(self._directory / "etcd"), etcd_url, f"http://{HOST}:{peer}")
        server = [
            *api_server_flags(str(pki), etcd_url, SERVICES),
            f"--bind-address={HOST}",
            f"--secure-port={secure}",
            # Nobody makes service accounts here, and pods without one are fine.
            "--disable-admission-plugins=ServiceAccount",
            *self._flags,
        ]
        self._spawn("etcd", binaries["etcd"], etcd)
        self._spawn("kube-apiserver", binaries["kube-apiserver"], server)
        self._wait()

    def _wait(self) -> None:
        with self.api() as api:
            watched = [child.pid for child in self._processes.values()] if sys.platform == "linux" else []
            wait_for("the API server", lambda: _serves(api), limit=LIMIT, watched=watched, dead=self._obituary)

    def _spawn(self, name: str, binary: Path, arguments: Sequence[str]) -> None:
        # Where the kernel can do it, they end with us however we end.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        self._commands[name] = [*guard, str(binary), *arguments]
        self._run(name)

    def _run(self, name: str) -> None:
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._commands[name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=os.environ | GO_SETTINGS,
            )

    def kill(self, component: str) -> None:
        """Kill `etcd` or `kube-apiserver`, for tests of what happens then."""
        self._processes[component].send_signal(signal.SIGKILL)
        self._processes[component].wait(LIMIT)

    def revive(self, component: str) -> None:
        """Start what was killed, and wait until the API server is ready.

        It ends with the thread that calls this, as all children do with the one that started them.

        Raises:
            ClusterError: It did not get ready.
        """
        self._run(component)
        self._wait()

    def _obituary(self) -> str:
        ended = [name for name, child in self._processes.items() if child.poll() is not None]
        return "\n".join(f"{name} ended:\n{tail(self.log(name))}" for name in ended)

    def stop(self) -> None:
        """End both and remove their files; nothing happens the second time."""
        for child in reversed(self._processes.values()):
            child.send_signal(signal.SIGKILL)  # nothing of theirs is kept, so there is nothing to end in order
            child.wait(LIMIT)
        self._processes.clear()
        if self._directory != Path():
            shutil.rmtree(self._directory)
            self._directory = Path()
