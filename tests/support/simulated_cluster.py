"""A cluster of plain data for the operator's simulation: API server, controllers, scheduler and kubelets, tick by tick.

It has one app, ``ml/sdxl``. ``reconcile`` runs over it as over a real one. What goes wrong is decided by an ``interrupt``,
which is asked before and after every call, reads and writes alike.
"""

from __future__ import annotations

import itertools
import marshal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from drumline_operator.cluster import Conflict, Refused, Unavailable
from drumline_operator.manifests.labels import APP, REVISION
from drumline_operator.reconcile import Load

KEY = "ml/sdxl"
NODES = ("n1", "n2")
GPUS_PER_NODE = 4
GRACE = 2  # ticks that a pod needs to stop
READY = 3  # ticks until a pod is ready
CRASH = 2  # ticks until a pod of the image "crash" has ended

WRITES = {"apply", "delete", "set_status"}

Raw = dict[str, Any]
#: Asked with the number of the call, its name, and "before" or "after" it was done. It raises what the caller gets.
Interrupt = Callable[[int, str, str], None]


def copied(data: Any) -> Any:
    """A deep copy of plain data, ten times as fast as ``copy.deepcopy``."""
    return marshal.loads(marshal.dumps(data))


def nothing(number: int, call: str, when: str) -> None:
    """No call is interrupted."""


class Death(BaseException):
    """The operator's process is gone: nobody catches this."""


class SimulatedCluster:
    """The port, and everything behind it.

    Attributes:
        objects: by kind and name; the app is ``DistributedApp``, ``sdxl``.
        pods: by name. ``x`` is what only their makers know.
        dead: nodes that have failed.
        calls: of the port, so far.
        writes: those of them that change something, but for events.
        events: reason and message.
        crowded: whether a group was ever made before an old one had been told to go, where no surge is allowed.
        load: what the operator's queue has to do beside this app.
        lagging: whether reads come from what was delivered last, and own writes, as from a watch.
    """

    def __init__(self, interrupt: Interrupt = nothing, *, lagging: bool = False) -> None:
        self.interrupt = interrupt
        self.lagging = lagging
        self.load = Load()
        self.objects: dict[tuple[str, str], Raw] = {}
        self.pods: dict[str, Raw] = {}
        self.dead: set[str] = set()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.events: list[tuple[str, str]] = []
        self.calls = self.writes = 0
        self.crowded = False
        self._ids = (f"id-{number:04}" for number in itertools.count())
        self._versions = itertools.count(1)
        self._seen: tuple[dict[tuple[str, str], Raw], dict[str, Raw]] = ({}, {})

    # --- what users do

    def create_app(self, **spec: Any) -> None:
        """Make the app, or another one of its name."""
        full = {"workerClass": "app:W", "image": "a:1", "numGPUs": 2, "replicas": 1, **spec}
        self.objects["DistributedApp", "sdxl"] = {
            "apiVersion": "drumline.dev/v1alpha1",
            "kind": "DistributedApp",
            "metadata": {"name": "sdxl", "namespace": "ml", "generation": 1, **self._new()},
            "spec": full,
        }

    def put(self, kind: str, name: str, **content: Any) -> None:
        """Make or replace an object that is nobody's child."""
        self.objects[kind, name] = {"kind": kind, "metadata": {"name": name, **self._new()}, **content}

    @property
    def app(self) -> Raw:
        """The app."""
        return self.objects["DistributedApp", "sdxl"]

    def edit(self, **spec: Any) -> None:
        """Change the app's spec."""
        if any(self.app["spec"].get(key) != value for key, value in spec.items()):
            self.app["spec"] = {**self.app["spec"], **spec}
            self.app["metadata"]["generation"] += 1
            self._touch(self.app)

    def make_again(self, kind: str, **spec: Any) -> None:
        """Somebody deletes a child and makes it again, with the same owner and another spec."""
        child = self.objects[kind, "sdxl"]
        child["metadata"] |= {**self._new(), "creationTimestamp": self._stamp()}
        child["spec"] |= copied(spec)

    def kill_node(self, node: str) -> None:
        """A node fails, and its pods with it."""
        self.dead.add(node)
        for name, pod in list(self.pods.items()):
            if pod["spec"]["nodeName"] == node:
                del self.pods[name]

    def deliver(self) -> None:
        """The watches catch up."""
        if self.lagging:
            self._seen = (copied(self.objects), copied(self.pods))

    # --- the port

    async def get(self, kind: str, namespace: str | None, name: str) -> Mapping[str, Any] | None:
        with self._call("get"):
            return copied(self._known[0].get((kind, name)))

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Mapping[str, Any]]:
        with self._call("list"):
            if kind == "Node":
                return [self._node(name) for name in NODES]
            if kind == "MachineType":
                return [copied(each) for (of, _), each in self._known[0].items() if of == kind]
            assert (kind, selector) == ("Pod", f"{APP}=sdxl")
            return copied([*self._known[1].values()])

    async def apply(self, manifest: Mapping[str, Any]) -> None:
        with self._call("apply", write=True):
            key = (manifest["kind"], manifest["metadata"]["name"])
            live = self.objects.get(key)
            if live is not None and _owner(live) != _owner(manifest):
                raise Refused("metadata.ownerReferences: only one reference can have controller set to true")
            fixed = {"Deployment": "selector", "Service": "clusterIP"}.get(key[0], "")
            wanted = copied(dict(manifest))
            if live and live["spec"].get(fixed) != wanted["spec"].get(fixed):
                if fixed == "selector":
                    raise Refused("spec.selector: field is immutable")
                wanted["spec"][fixed] = live["spec"][fixed]
            wanted["spec"] |= {"defaulted": True}
            meta = {**self._new(), "generation": 1}
            if live:
                changed = live["spec"] != wanted["spec"]
                meta |= {"uid": live["metadata"]["uid"], "generation": live["metadata"]["generation"] + changed}
                wanted["status"] = live.get("status", {})
            wanted["metadata"] |= meta
            self.objects[key] = wanted
            self._seen[0][key] = copied(wanted)

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, orphan: bool = False) -> None:
        with self._call("delete", write=True):
            if kind == "Pod":
                if name in self.pods and self.pods[name]["metadata"]["uid"] == uid:
                    self._stop(self.pods[name])
                self._seen[1].pop(name, None)
                return
            if (kind, name) in self.objects:
                if self.objects[kind, name]["metadata"]["uid"] != uid:
                    raise Conflict("another one")
                del self.objects[kind, name]
                for pod in self.pods.values():
                    if orphan and pod["x"]["owner"] == uid:
                        pod["x"]["owner"] = None
            self._seen[0].pop((kind, name), None)

    async def set_status(self, raw: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        with self._call("set_status", write=True):
            live = self.objects.get((raw["kind"], raw["metadata"]["name"]))
            if live is None or live["metadata"]["resourceVersion"] != raw["metadata"]["resourceVersion"]:
                raise Conflict("the object has been modified")
            live["status"] = copied(dict(status))
            self._touch(live)
            self._seen[0][raw["kind"], raw["metadata"]["name"]] = copied(live)

    async def event(self, raw: Mapping[str, Any], type: str, reason: str, message: str) -> None:
        with self._call("event"):
            self.events.append((reason, message))

    async def pod_warnings(self, namespace: str, uid: str) -> Sequence[Mapping[str, Any]]:
        with self._call("pod_warnings"):
            return []

    async def runner_status(self, pod: Mapping[str, Any], port: int) -> Mapping[str, Any] | None:
        with self._call("runner_status"):
            found = self.pods.get(pod["metadata"]["name"])
            if found is None:
                return None
            ready = found["x"]["age"] >= READY
            return {"state": "ready" if ready else "starting", "worldSize": 2, "readyRanks": 2 * ready, "restarts": 0}

    @contextmanager
    def _call(self, name: str, *, write: bool = False) -> Iterator[None]:
        number = self.calls
        self.calls += 1
        self.writes += write
        self.interrupt(number, name, "before")
        yield
        self.interrupt(number, name, "after")

    @property
    def _known(self) -> tuple[dict[tuple[str, str], Raw], dict[str, Raw]]:
        return self._seen if self.lagging else (self.objects, self.pods)

    def _new(self) -> Raw:
        return {"uid": next(self._ids), "resourceVersion": str(next(self._versions))}

    def _touch(self, raw: Raw) -> None:
        raw["metadata"]["resourceVersion"] = str(next(self._versions))

    def _node(self, name: str) -> Raw:
        ready = "Unknown" if name in self.dead else "True"
        return {
            "metadata": {"name": name, "labels": {"pool": "gpu"}},
            "spec": {},
            "status": {
                "allocatable": {"nvidia.com/gpu": str(GPUS_PER_NODE)},
                "conditions": [{"type": "Ready", "status": ready}],
            },
        }

    # --- the rest of the cluster

    def tick(self) -> None:
        """Time passes: controllers, scheduler and kubelets do one step each."""
        self.now += timedelta(seconds=5)
        self._collect()
        for (kind, _), each in list(self.objects.items()):
            if kind == "Deployment" and _owner(each):
                self._control(each)
        self._schedule()
        for pod in list(self.pods.values()):
            self._age(pod)

    def _collect(self) -> None:
        uids = {each["metadata"]["uid"] for each in self.objects.values()}
        for key, each in list(self.objects.items()):
            if any(owner["uid"] not in uids for owner in each["metadata"].get("ownerReferences", ())):
                del self.objects[key]
        uids = {each["metadata"]["uid"] for each in self.objects.values()}
        for pod in self.pods.values():
            if pod["x"]["owner"] is not None and pod["x"]["owner"] not in uids:
                self._stop(pod)

    def _control(self, live: Raw) -> None:
        """A Deployment controller: as in Kubernetes, pods that stop do not count."""
        spec, uid = live["spec"], live["metadata"]["uid"]
        for pod in self.pods.values():
            if (
                pod["x"]["owner"] is None
                and pod["metadata"]["labels"].items() >= spec["selector"]["matchLabels"].items()
            ):
                pod["x"]["owner"] = uid
        mine = [pod for pod in self.pods.values() if pod["x"]["owner"] == uid]
        active = [pod for pod in mine if not stopping(pod)]
        new = [pod for pod in active if pod["x"]["template"] == spec["template"]]
        old = sorted((pod for pod in active if pod not in new), key=ready)
        rolling = spec["strategy"].get("rollingUpdate")
        surge, missing = (rolling["maxSurge"], rolling["maxUnavailable"]) if rolling else (0, spec["replicas"])
        spare = len(active) - (spec["replicas"] - missing) - sum(not ready(pod) for pod in new)
        idle = [pod for pod in old if not ready(pod)]
        for pod in [*idle, *[pod for pod in old if ready(pod)][: max(0, spare - len(idle))]]:
            self._stop(pod)
        for pod in sorted(new, key=ready)[: max(0, len(new) - spec["replicas"])]:
            self._stop(pod)
        active = [pod for pod in active if not stopping(pod)]
        count = min(spec["replicas"] - len(new), spec["replicas"] + surge - len(active))
        if not rolling and len(mine) > len(new):
            return
        self.crowded |= count > 0 and len(active) + count > spec["replicas"]
        for _ in range(count):
            name = f"sdxl-{next(self._ids)}"
            labels = spec["template"]["metadata"]["labels"]
            self.pods[name] = {
                "metadata": {
                    "name": name,
                    "uid": next(self._ids),
                    "labels": labels,
                    "creationTimestamp": self._stamp(),
                },
                "spec": {"nodeName": None},
                "status": {"phase": "Pending", "conditions": []},
                "x": {"owner": uid, "template": spec["template"], "age": 0, "grace": GRACE},
            }

    def _schedule(self) -> None:
        for pod in self.pods.values():
            if pod["spec"]["nodeName"] or stopping(pod):
                continue
            wanted = gpus(pod)
            fitting = [node for node in NODES if node not in self.dead and self.free(node) >= wanted]
            if fitting:
                pod["spec"]["nodeName"] = fitting[0]
                pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            else:
                words = f"0/{len(NODES)} nodes are available: {len(NODES)} Insufficient nvidia.com/gpu."
                pod["status"]["conditions"] = [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
                ]

    def _age(self, pod: Raw) -> None:
        if stopping(pod):
            pod["x"]["grace"] -= 1
            if pod["x"]["grace"] <= 0 or not pod["spec"]["nodeName"]:
                del self.pods[pod["metadata"]["name"]]
            return
        if not pod["spec"]["nodeName"]:
            return
        pod["x"]["age"] += 1
        bad, crashed = image(pod) == "bad", image(pod) == "crash" and pod["x"]["age"] >= CRASH
        running, served = pod["x"]["age"] >= READY - 1 and not bad, pod["x"]["age"] >= READY and not (bad or crashed)
        state: Raw = {
            "waiting": {"reason": "ImagePullBackOff" if bad else "ContainerCreating", "message": "no such image"}
        }
        last: Raw = {}
        if crashed:
            state = {"waiting": {"reason": "CrashLoopBackOff"}}
            last = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": self._stamp()}}
        elif running:
            state = {"running": {}}
        pod["status"] |= {
            "phase": "Running" if running else "Pending",
            "podIP": "10.0.0.1",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True" if served else "False"},
            ],
            "containerStatuses": [
                {
                    "name": "worker",
                    "ready": served,
                    "restartCount": int(crashed),
                    "state": state,
                    "lastState": last,
                }
            ],
        }

    def free(self, node: str) -> int:
        """GPUs of a node that no pod has."""
        return GPUS_PER_NODE - sum(gpus(pod) for pod in self.pods.values() if pod["spec"]["nodeName"] == node)

    def _stop(self, pod: Raw) -> None:
        pod["metadata"].setdefault("deletionTimestamp", self._stamp())

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")


class Faults:
    """An interrupt that spoils the first writes, in turn: ok, lost, late (done, but an error all the same) or conflict."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = iter(kinds)
        self._fault = "ok"

    def __call__(self, number: int, call: str, when: str) -> None:
        if call not in WRITES:
            return
        if when == "before":
            self._fault = next(self._kinds, "ok")
            if self._fault == "lost":
                raise Unavailable("the connection broke")
            if self._fault == "conflict":
                raise Conflict("somebody else was first")
        elif self._fault == "late":
            raise Unavailable("no answer in time")


def stopping(pod: Raw) -> bool:
    """Whether a pod has been told to go."""
    return "deletionTimestamp" in pod["metadata"]


def ready(pod: Raw) -> bool:
    """Whether a pod is ready."""
    return {"type": "Ready", "status": "True"} in pod["status"]["conditions"]


def _worker(pod: Raw) -> Raw:
    (worker,) = pod["x"]["template"]["spec"]["containers"]
    return dict(worker)


def gpus(pod: Raw) -> int:
    """GPUs that a pod asks for."""
    return int(_worker(pod)["resources"]["limits"]["nvidia.com/gpu"])


def image(pod: Raw) -> str:
    """A pod's image."""
    return str(_worker(pod)["image"])


def revision(pod: Raw) -> str:
    """The revision of the app that a pod was made from."""
    return str(pod["metadata"]["labels"][REVISION])


def _owner(raw: Mapping[str, Any]) -> str:
    return next((str(owner["uid"]) for owner in raw["metadata"].get("ownerReferences") or ()), "")
