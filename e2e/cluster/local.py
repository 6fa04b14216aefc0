"""The cluster made of namespaces on this machine: up, down, status, and its parts."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import cgroups, components, configs, dns, machine, network, nodes, objects, pins, pki, runtime
from .api import Api, ApiError
from .builder import Builder
from .errors import ClusterError
from .layout import CLUSTER_DOMAIN, GPU_RESOURCE, NODE_LABEL, Layout, Network, Node, Shape
from .process import Process, command
from .sandbox import NodeSandbox, Sandbox
from .store import Store
from .waiting import tail, wait_for

#: Seconds that a step of `up` may take on a slow and busy machine.
LIMIT = 120.0


class LocalCluster:
    """Two nodes (or more) on one Linux machine.

    Attributes:
        layout: Where its run state is.
        store: Where its binaries are.
        shape: What it consists of.
    """

    def __init__(
        self, layout: Layout | None = None, store: Store | None = None, report: Callable[[str], None] = print
    ) -> None:
        self.layout = layout or Layout.default()
        self.store = store or Store(report=report)
        self._say = report
        self._started = time.monotonic()
        self._use(self._saved_shape() or Shape())

    def _use(self, shape: Shape) -> None:
        self.shape = shape
        self.network = Network(shape.network)
        self.fabric = Sandbox(self.layout, self.store, "fabric")
        self.nodes = [NodeSandbox(self.layout, self.store, node) for node in shape.members()]

    def _saved_shape(self) -> Shape | None:
        try:
            return Shape.from_dict(json.loads(self.layout.shape.read_text()))
        except FileNotFoundError:
            return None

    @property
    def kubeconfig(self) -> Path:
        """The administrator's; exists while the cluster does."""
        return self.layout.kubeconfig

    @property
    def _boxes(self) -> list[Sandbox]:
        return [self.fabric, *self.nodes]

    # -- up

    def up(self, shape: Shape | None = None) -> None:
        """Start the cluster, or what is missing of it, and wait until pods can run, see GPUs and resolve names.

        Args:
            shape: What to start; None for what runs already, or the default.

        Raises:
            ClusterError: With the end of the log of the component that failed.
        """
        self._started = time.monotonic()
        machine.check()
        machine.install(report=self._say)
        machine.check_state_directory(self.layout.state)
        self.store.ensure(pins.CLUSTER_PROGRAMS)
        with self._exclusive():
            self._prepare(shape)
            with ThreadPoolExecutor() as pool, self.api() as api:
                control = self.nodes[0]
                self._ensure(control, "etcd")
                started = [pool.submit(self._start_runtime, box) for box in self.nodes]
                self._ensure(control, "kube-apiserver")
                self._wait("the API server", api.ready)
                self._report("API server ready")
                for component in ("kube-controller-manager", "kube-scheduler"):
                    self._ensure(control, component)
                for item in [*objects.dns(self.network), *objects.gpu_plugin(self.shape.gpus)]:
                    self._apply(api, item)
                for result in started:
                    result.result()
                self._report("images imported")
                for box in self.nodes:
                    for component in self._components(box):
                        self._ensure(box, component)
                self._wait_for_nodes(api)
                self._report("GPUs allocatable")
                self._wait("the cluster's DNS", self._dns_answers)
                self._report("DNS answers")
                self._wait_for_nodes(api)  # what was Ready a while ago may have been tainted since

    def _prepare(self, shape: Shape | None) -> None:
        """Have namespaces and a network: those that run, or new ones."""
        saved = self._saved_shape()
        self._use(saved or shape or Shape())
        alive = [box.name for box in self._boxes if box.alive]
        if saved and len(alive) == len(self._boxes):
            if shape and shape.to_dict() | {"network": 0} != saved.to_dict() | {"network": 0}:
                raise ClusterError("a cluster with other options runs here; remove it first (`make cluster-down`)")
            return
        if saved or self.layout.run.exists():  # after a reboot, or a command that was interrupted
            self._remove()
        self._create(shape or saved or Shape())

    def _create(self, shape: Shape) -> None:
        machine.load_modules()
        reserved = network.reserve()
        self._use(Shape.from_dict(shape.to_dict() | {"network": reserved.index}))
        self.layout.run.mkdir(parents=True)
        self.layout.shape.write_text(json.dumps(self.shape.to_dict(), indent=1))
        try:
            members = [box.node for box in self.nodes]
            pki.create(self.layout.pki, self.layout.kubeconfig, self.network, members)
            cgroups.create(self.network.cgroup, [node.name for node in members])
            for node in members:
                self._write_configs(node)
            for box in self._boxes:
                box.start()
            network.connect(self.network, self.fabric, self.nodes)
        except BaseException:
            self._remove()
            raise
        self._report(f"namespaces and network {self.network.whole} made")

    def _write_configs(self, node: Node) -> None:
        directory = self.layout.node(node.name) / "etc"
        directory.mkdir(parents=True)
        texts = configs.files(
            node,
            pause=pins.image_reference("pause", self.store.tools),
            plugins=[self.store.program("bridge").parent],
            proxy_mode=self.shape.proxy_mode,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        )
        for name, text in texts.items():
            (directory / name).write_text(text)

    def _start_runtime(self, box: NodeSandbox) -> None:
        self._ensure(box, "containerd")
        self._wait(f"containerd on {box.name}", runtime.Runtime(box).answers)
        for name in pins.NODE_IMAGES:
            runtime.load([box], self.store.image(name))

    def _ensure(self, box: NodeSandbox, component: str) -> None:
        process = box.component(component)
        if not process or not process.alive:
            box.spawn(component, *components.arguments(component, box.node))

    def api(self) -> Api:
        """A connection to the API server, as its administrator."""
        host, port = components.api_server_address(self.network)
        return Api(host, port, self.layout.pki)

    def _apply(self, api: Api, item: Mapping[str, Any]) -> None:
        """Right after its start the API server still makes namespaces and address ranges, and refuses what needs them."""
        problem: list[str] = []

        def applied() -> bool:
            try:
                api.apply(item)
            except ApiError as error:
                if error.status in {400, 413, 415, 422}:  # our own mistake
                    raise
                problem[:] = [str(error)]
                return False
            return True

        self._wait(f"{item['kind']} {item['metadata']['name']}", applied, lambda: " ".join(problem))

    def _wait_for_nodes(self, api: Api) -> None:
        found: dict[str, Mapping[str, Any]] = {}

        def done(name: str, item: Mapping[str, Any] | None) -> bool:
            found[name] = item or {}
            mine = [found.get(box.name) or {} for box in self.nodes]
            # Both at one time: the node controller looks every 5 s, and may taint a node for what it has seen before it was
            # Ready; that taint stays until it looks again.
            return all(nodes.is_usable(node) and nodes.gpus_of(node) == self.shape.gpus for node in mine)

        def explain() -> str:
            states = [
                f"{name}: {nodes.state(node)}, {GPU_RESOURCE} {nodes.gpus_of(node)}" for name, node in found.items()
            ]
            return "\n".join([*states, self._tails()])

        nodes.wait(api, done, limit=LIMIT, check=self.check, explain=explain)

    def _dns_answers(self) -> bool:
        """Whether it does so on the machine and on every node: each node's kube-proxy writes its rules when it gets to it."""
        name, server = f"kubernetes.default.svc.{CLUSTER_DOMAIN}", self.network.dns
        if dns.resolve(name, server) != self.network.api_service:
            return False
        inside = (sys.executable, "-I", dns.__file__, name, server)
        return all(box.network(*inside).strip() == self.network.api_service for box in self.nodes)

    # -- what runs

    def _processes(self) -> Iterator[tuple[NodeSandbox, str, Process | None]]:
        for box in self.nodes:
            for name in self._components(box):
                yield box, name, box.component(name)

    def _components(self, box: NodeSandbox) -> list[str]:
        optional = ["kwok"] if box.node.is_control_plane and box.component("kwok") else []
        return [*components.start_order(box.node), *optional]

    def _wait(self, what: str, ready: Callable[[], bool], explain: Callable[[], str] = str) -> None:
        watched = [process.pid for _, _, process in self._processes() if process and process.alive]
        wait_for(
            what,
            ready,
            limit=LIMIT,
            watched=watched,
            dead=self._obituary,
            explain=lambda: explain() or self._tails(),
        )

    def check(self) -> None:
        """Nothing happens while every component that was started runs.

        Raises:
            ClusterError: One has ended; with the end of its log.
        """
        if words := self._obituary():
            raise ClusterError(words)

    def _obituary(self) -> str:
        """The last words of every component that has ended."""
        return "\n".join(
            f"{name} on {box.name} ended:\n{tail(self.layout.log(box.name, name))}"
            for box, name, process in self._processes()
            if process and not process.alive
        )

    def _tails(self) -> str:
        return "\n".join(
            f"--- {name} on {box.name}\n{tail(self.layout.log(box.name, name), 5)}"
            for box, name, _ in self._processes()
        )

    def _report(self, what: str) -> None:
        self._say(f"{time.monotonic() - self._started:6.2f} s  {what}")

    def status(self) -> bool:
        """Say what runs.

        Returns:
            Whether all of it does.
        """
        if not self._saved_shape():
            self._say("no cluster runs here; start one with `make cluster-up`")
            return False
        healthy = True
        self._say(f"{'node':8} {'component':26} {'pid':>8} {'MiB':>7} {'CPU s':>8}")
        for box, name, process in self._processes():
            numbers = "    dead"
            if process and process.alive:
                numbers = f"{process.pid:8} {process.resident_bytes / 2**20:7.1f} {process.cpu_seconds:8.2f}"
            else:
                healthy = False
            self._say(f"{box.name:8} {name:26} {numbers}")
        if not healthy:
            self._say("start what is dead with `make cluster-up`")
            return False
        with self.api() as api:
            for node in api.get(f"/api/v1/nodes?labelSelector={NODE_LABEL}%3Dtrue")["items"]:
                healthy &= nodes.is_usable(node)
                self._say(f"{node['metadata']['name']:8} {nodes.state(node):26} {GPU_RESOURCE} {nodes.gpus_of(node)}")
        self._say(f"export KUBECONFIG={self.kubeconfig}")
        return healthy

    # -- down

    def down(self) -> None:
        """Remove everything that `up` made, and nothing else. Built binaries and images stay in the user's cache."""
        if self.layout.state.exists():
            with self._exclusive():
                self._use(self._saved_shape() or self.shape)
                self._remove()
                for path in self.layout.state.iterdir():
                    raise ClusterError(f"{path} is not the cluster's, so {self.layout.state} stays")
                self.layout.state.rmdir()

    def _remove(self) -> None:
        for box in reversed(self._boxes):
            box.stop()
        if self.shape.network >= 0:
            network.disconnect(self.network)
            cgroups.remove(self.network.cgroup)
        for directory in (self.layout.containerd, self.layout.run):  # the shape goes last: it tells what there is
            if directory.exists():
                shutil.rmtree(directory)
        self.layout.kubeconfig.unlink(missing_ok=True)

    # -- other commands

    def load_image(self, path: Path, name: str = "") -> None:
        """Bring the images of an OCI layout (a directory or a tar file) into every node.

        Args:
            path: The layout.
            name: What to call the image if it has no full name.
        """
        started = time.monotonic()
        copied = runtime.load(self.nodes, path, name, Builder(report=self._say).unpacked())
        sizes = ", ".join(f"{size / 1e6:.1f} MB to {node}" for node, size in copied.items())
        self._say(f"copied {sizes} in {time.monotonic() - started:.1f} s")

    def stop(self, node: str, component: str) -> None:
        """Kill one component, for tests of failures."""
        if process := self.box(node, component).component(component):
            process.kill()

    def start(self, node: str, component: str) -> None:
        """Start one component if it does not run."""
        box = self.box(node) if component == "kwok" else self.box(node, component)
        self._ensure(box, component)

    def execute(self, node: str, arguments: Sequence[str]) -> int:
        """Run a command on a node, with our standard streams; its exit status."""
        box = self.box(node)
        return subprocess.run([*box.enter(*box.NAMESPACES), *arguments], env=box.environment, check=False).returncode

    def box(self, node: str, component: str = "") -> NodeSandbox:
        """A node by its name, which must run `component`."""
        for box in self.nodes:
            if box.name == node:
                names = self._components(box)
                if component and component not in names:
                    raise ClusterError(f"{node} has no {component}; it runs {', '.join(names)}")
                return box
        raise ClusterError(f"there is no node {node}; there are {', '.join(box.name for box in self.nodes)}")

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl as the administrator and return what it prints."""
        return command(self.store.program("kubectl"), *arguments, env=self.environment(), input=input)

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl, helm and tests reach this cluster."""
        # kubectl's own cache would go to the home directory.
        ours = {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(self.layout.run / "kubectl-cache")}
        return os.environ | ours | {"PATH": f"{self.store.program('kubectl').parent}:{os.environ.get('PATH', '')}"}

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One command at a time changes a cluster."""
        descriptor = os.open(self.layout.state, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
