"""The namespaces that make a node, and commands inside them.

A node looks like an ordinary machine from inside: /etc, /opt and /var are overlays with a tmpfs on top, /run is a tmpfs, and
configuration files carry the usual paths. The machine's own directories stay as they are; the rest of the file system is
the machine's.
"""

from __future__ import annotations

import contextlib
import selectors
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .components import GO_SETTINGS
from .errors import ClusterError
from .layout import Layout, Node
from .process import Process, command
from .store import Store

#: The kubelet sets these for the whole machine; inside a node they are ordinary files, so the machine keeps its values.
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Sandbox:
    """Namespaces held open by one process; when it dies, the kernel kills everything else in its pid namespace."""

    NAMESPACES: tuple[str, ...] = ("net",)
    FLAGS: tuple[str, ...] = ("--fork", "--kill-child=SIGKILL")

    def __init__(self, layout: Layout, store: Store, name: str) -> None:
        self.layout = layout
        self.store = store
        self.name = name
        self.directory = layout.node(name)
        #: Process 1 of the sandbox.
        self.init = Process.load(self.directory / "init.pid")
        #: The `unshare` that waits for it.
        self.outer = Process.load(self.directory / "unshare.pid")

    @property
    def alive(self) -> bool:
        """Whether the namespaces are there."""
        return self.init is not None and self.init.alive

    def start(self) -> None:
        """Make the namespaces.

        Raises:
            ClusterError: They cannot be made; the message has the reason.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / "sandbox.log"
        # The holder must not keep our output open: `up | cat` would wait for the cluster's end.
        holder = 'echo ready; exec "$0" </dev/null >>"$1" 2>&1'
        names = [f"--{namespace}" for namespace in self.NAMESPACES]
        line = ["unshare", *names, *self.FLAGS, "sh", "-c", holder, str(self.store.program("pause")), str(log)]
        with log.open("ab") as errors:
            child = subprocess.Popen(
                line, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        assert child.stdout
        with child.stdout, selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(10) or child.stdout.readline() != b"ready\n":
                child.kill()
                child.wait(10)
                raise ClusterError(f"the namespaces of {self.name} did not start: {log.read_text().strip()}")
        self.outer = Process.of(child.pid)
        self.outer.save(self.directory / "unshare.pid")
        (inner,) = self.outer.children
        self.init = Process.of(inner)
        self.init.save(self.directory / "init.pid")
        child.returncode = 0  # from now on it is known by its record alone, also to the `down` of another command

    def stop(self) -> None:
        """End everything in the sandbox."""
        if self.init:
            self.init.kill()
        if self.outer and not self.outer.wait(5.0):  # it ends by itself, and reaps its child
            self.outer.kill()

    def enter(self, *namespaces: str) -> list[str]:
        """The beginning of a command line that runs the rest inside."""
        if not self.init or not self.init.alive:
            raise ClusterError(f"{self.name} does not run; start the cluster with `make cluster-up`")
        return ["nsenter", "--target", str(self.init.pid), *(f"--{namespace}" for namespace in namespaces), "--"]

    def network(self, *arguments: str | Path) -> str:
        """Run a command of the machine in the sandbox's network."""
        return command(*self.enter("net"), *arguments)


class NodeSandbox(Sandbox):
    """A node: its own network, mounts, processes and host name, over the machine's own file system."""

    NAMESPACES = ("net", "mount", "uts", "ipc", "pid")
    FLAGS = (*Sandbox.FLAGS, "--mount-proc", "--propagation=private")

    def __init__(self, layout: Layout, store: Store, node: Node) -> None:
        super().__init__(layout, store, node.name)
        self.node = node

    @property
    def environment(self) -> dict[str, str]:
        """The environment of everything in the node; nothing of the caller's gets in."""
        return {"PATH": f"{self.store.search_path()}:{SYSTEM_PATH}", "HOME": "/root", **GO_SETTINGS}

    def command(self, *arguments: str | Path) -> str:
        """Run a command in the node."""
        return command(*self.enter(*self.NAMESPACES), *arguments, env=self.environment)

    def start(self) -> None:
        """Make the namespaces and the file system."""
        super().start()
        self.command("sh", "-ec", self._file_system())

    def _file_system(self) -> str:
        binds = {
            "/var/lib/kubelet": self.directory / "kubelet",
            "/var/lib/containerd": self.layout.containerd / self.name,
            "/var/log": self.directory / "log",
            "/etc/kubernetes": self.directory / "etc",
            "/etc/kubernetes/pki": self.layout.pki,
        }
        for source in binds.values():
            source.mkdir(parents=True, exist_ok=True)
        return "\n".join(file_system_script(self.node, binds))

    def path(self, inside: str) -> Path:
        """A file of the node, as the machine sees it."""
        if not self.init:
            raise ClusterError(f"{self.name} does not run; start the cluster with `make cluster-up`")
        return Path(f"/proc/{self.init.pid}/root{inside}")

    def spawn(self, component: str, *arguments: str) -> Process:
        """Start a component in the background; the node's process 1 adopts it.

        One that runs already is taken instead: an `up` that was killed may have started it without writing it down.
        """
        if process := self._running(self.store.program(arguments[0])):
            process.save(self.directory / f"{component}.pid")
            return process
        log = self.layout.log(self.name, component)
        log.parent.mkdir(parents=True, exist_ok=True)
        script = f'setsid "$@" </dev/null >>{shlex.quote(f"/var/log/{log.name}")} 2>&1 & echo $!'
        inner = int(self.command("sh", "-c", script, component, *arguments))
        process = self._outside(inner)
        process.save(self.directory / f"{component}.pid")
        return process

    def component(self, name: str) -> Process | None:
        """The process of a component that was started here."""
        return Process.load(self.directory / f"{name}.pid")

    def _running(self, program: Path) -> Process | None:
        """The process of this node that runs a program of ours."""
        for pid, _ in self._pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/exe").readlink() == program:
                    return Process.of(pid)
        return None

    def _pids(self) -> Iterator[tuple[int, int]]:
        return _pids(self.path("").parent / "ns/pid")

    def _outside(self, inner: int) -> Process:
        """The process that has the pid `inner` in this node."""
        for pid, inside in self._pids():
            if inside == inner:
                return Process.of(pid)
        raise ClusterError(f"a process on {self.name} ended at once; see {self.directory / 'log'}")


def _pids(namespace: Path) -> Iterator[tuple[int, int]]:
    """All processes of a pid namespace: the machine's pid, the namespace's pid."""
    wanted = namespace.readlink()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                if (directory / "ns/pid").readlink() != wanted:
                    continue
                status = (directory / "status").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or none of ours
                continue
            line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
            yield int(directory.name), int(line.split()[-1])


def file_system_script(node: Node, binds: dict[str, Path]) -> list[str]:
    """Shell lines that give a node its own /etc, /opt, /run and /var.

    Args:
        node: Whose.
        binds: The machine's directories by their place in the node.
    """
    lines = ["mount --make-rshared /", "mount -t tmpfs -o mode=755 tmpfs /run"]
    # First to /run: under an overlay of /var, say, a state directory in /var could not be seen.
    for index, source in enumerate(binds.values()):
        lines.append(f"mkdir -p /run/bind/{index} && mount --bind {shlex.quote(str(source))} /run/bind/{index}")
    for top in ("etc", "opt", "var"):
        upper, work = f"/run/overlay/{top}", f"/run/overlay/{top}.work"
        lines.append(f"mkdir -p {upper} {work}")
        lines.append(f"mount -t overlay -o lowerdir=/{top},upperdir={upper},workdir={work} overlay /{top}")
    lines.append("rm -rf /var/run && ln -s /run /var/run")
    for index, inside in enumerate(binds):
        lines.append(f"mkdir -p {inside} && mount --bind /run/bind/{index} {inside}")
    lines.append("mkdir -p /var/lib/etcd /etc/cni/net.d && mount -t tmpfs -o size=1g,mode=700 tmpfs /var/lib/etcd")
    lines.append("cp /etc/kubernetes/cni.conflist /etc/cni/net.d/10-drumline.conflist")
    lines.append(f"rm -f /etc/resolv.conf /etc/hosts && echo nameserver {node.network.dns} >/etc/resolv.conf")
    lines.append(f"printf '127.0.0.1 localhost\\n{node.address} {node.name}\\n' >/etc/hosts && hostname {node.name}")
    lines.append("mkdir -p /run/sysctl")
    for index, (name, value) in enumerate(KUBELET_SYSCTLS.items()):
        lines.append(f"echo {value} >/run/sysctl/{index} && mount --bind /run/sysctl/{index} /proc/sys/{name}")
    return lines
