"""The operator against a small cluster that ages pods, loses writes, kills nodes and is edited by people.

``reconcile`` is the real one, over a port of plain data. Whatever happens, in the end the app is as its spec says, with
one child of each kind, and the operator has nothing left to do.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drumline_operator.cluster import ClusterError, Conflict, Unavailable
from drumline_operator.manifests.labels import APP, REVISION
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.reconcile import Outcome, reconcile
from drumline_operator.reference import places
from drumline_operator.settings import OperatorSettings

SETTINGS = OperatorSettings()
KEY = "ml/sdxl"
NODES = ("n1", "n2")
GPUS_PER_NODE = 4
GRACE = 2  # ticks that a pod needs to stop


class FakeCluster:
    """API server, controllers, scheduler and kubelets, one tick at a time.

    Args:
        faults: what becomes of the next calls that change something: ok, lost (an error, nothing done), late (done, but
            an error all the same) or conflict. Then all is well.
    """

    def __init__(self, faults: Sequence[str] = ()) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.dead: set[str] = set()
        self.faults = iter(faults)
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.events: list[tuple[str, str]] = []
        self._ids = (f"id-{number:04}" for number in itertools.count())
        self.calls = 0
        self.crowded = False

    # --- what users do

    def create_app(self, **spec: Any) -> None:
        full = {"workerClass": "app:W", "image": "a:1", "numGPUs": 2, "replicas": 1, **spec}
        self.objects["DistributedApp", "sdxl"] = {
            "apiVersion": "drumline.dev/v1alpha1",
            "kind": "DistributedApp",
            "metadata": {"name": "sdxl", "namespace": "ml", "uid": next(self._ids), "generation": 1},
            "spec": full,
        }

    @property
    def app(self) -> dict[str, Any]:
        return self.objects["DistributedApp", "sdxl"]

    def edit(self, **spec: Any) -> None:
        if any(self.app["spec"].get(key) != value for key, value in spec.items()):
            self.app["spec"] |= spec
            self.app["metadata"]["generation"] += 1

    # --- the port

    async def get(self, kind: str, namespace: str | None, name: str) -> Mapping[str, Any] | None:
        return copy.deepcopy(self.objects.get((kind, name)))

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Mapping[str, Any]]:
        assert (kind, selector) == ("Pod", f"{APP}=sdxl")
        return copy.deepcopy(list(self.pods.values()))

    async def apply(self, manifest: Mapping[str, Any]) -> None:
        with self._perhaps():
            key = (manifest["kind"], manifest["metadata"]["name"])
            live = self.objects.get(key)
            wanted = copy.deepcopy(dict(manifest))
            wanted["spec"] |= {"defaulted": True}
            meta = {"uid": live["metadata"]["uid"] if live else next(self._ids), "generation": 1}
            if live:
                meta["generation"] = live["metadata"]["generation"] + (live["spec"] != wanted["spec"])
                wanted["status"] = live.get("status", {})
            wanted["metadata"] |= meta
            self.objects[key] = wanted

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        with self._perhaps():
            if kind == "Pod":
                if name in self.pods and self.pods[name]["metadata"]["uid"] == uid:
                    self._stop(self.pods[name])
            elif (kind, name) in self.objects:
                if self.objects[kind, name]["metadata"]["uid"] != uid:
                    raise Conflict("another one")
                del self.objects[kind, name]

    async def set_status(self, raw: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        with self._perhaps():
            if self.app["metadata"]["uid"] != raw["metadata"]["uid"]:
                raise Conflict("another app")
            for each in status["conditions"]:
                verdict = f"{each['type']}={each['status']}"
                known = "any condition=Unknown" if each["status"] == "Unknown" else verdict
                assert known in places(each["reason"]), f"{verdict} {each['reason']}: not in docs/reference/status.md"
            self.app["status"] = copy.deepcopy(dict(status))

    async def event(self, raw: Mapping[str, Any], type: str, reason: str, message: str) -> None:
        self.events.append((reason, message))

    async def runner_status(self, pod: Mapping[str, Any], port: int) -> Mapping[str, Any] | None:
        ready = pod["x"]["age"] >= 3
        return {"state": "ready" if ready else "starting", "worldSize": 2, "readyRanks": 2 * ready, "restarts": 0}

    def _perhaps(self) -> Any:
        return _Perhaps(self)

    # --- the rest of the cluster

    def tick(self) -> None:
        self.now += timedelta(seconds=5)
        self._collect()
        for key, each in list(self.objects.items()):
            if key[0] == "Deployment":
                self._control(each)
        self._schedule()
        for pod in list(self.pods.values()):
            self._age(pod)

    def _collect(self) -> None:
        uids = {each["metadata"]["uid"] for each in self.objects.values()}
        for key, each in list(self.objects.items()):
            if any(owner["uid"] not in uids for owner in each["metadata"].get("ownerReferences", ())):
                del self.objects[key]
        for pod in self.pods.values():
            if pod["x"]["owner"] not in {each["metadata"]["uid"] for each in self.objects.values()}:
                self._stop(pod)

    def _control(self, live: dict[str, Any]) -> None:
        """A Deployment controller: as in Kubernetes, pods that stop do not count."""
        spec, uid = live["spec"], live["metadata"]["uid"]
        mine = [pod for pod in self.pods.values() if pod["x"]["owner"] == uid]
        active = [pod for pod in mine if not self.stopping(pod)]
        new = [pod for pod in active if pod["x"]["template"] == spec["template"]]
        old = sorted((pod for pod in active if pod not in new), key=self.ready)
        rolling = spec["strategy"].get("rollingUpdate")
        surge, missing = (rolling["maxSurge"], rolling["maxUnavailable"]) if rolling else (0, spec["replicas"])
        spare = len(active) - (spec["replicas"] - missing) - sum(not self.ready(pod) for pod in new)
        idle = [pod for pod in old if not self.ready(pod)]
        for pod in [*idle, *[pod for pod in old if self.ready(pod)][: max(0, spare - len(idle))]]:
            self._stop(pod)
        for pod in sorted(new, key=self.ready)[: max(0, len(new) - spec["replicas"])]:
            self._stop(pod)
        active = [pod for pod in active if not self.stopping(pod)]
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
            if pod["spec"]["nodeName"] or self.stopping(pod):
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

    def _age(self, pod: dict[str, Any]) -> None:
        if self.stopping(pod):
            pod["x"]["grace"] -= 1
            if pod["x"]["grace"] <= 0 or not pod["spec"]["nodeName"]:
                del self.pods[pod["metadata"]["name"]]
            return
        if not pod["spec"]["nodeName"]:
            return
        pod["x"]["age"] += 1
        bad = image(pod) == "bad"
        running, ready = pod["x"]["age"] >= 2 and not bad, pod["x"]["age"] >= 3 and not bad
        state = {"waiting": {"reason": "ImagePullBackOff" if bad else "ContainerCreating", "message": "no such image"}}
        pod["status"] |= {
            "phase": "Running" if running else "Pending",
            "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}],
            "containerStatuses": [{"name": "worker", "ready": ready, "state": {"running": {}} if running else state}],
        }

    def kill_node(self, node: str) -> None:
        self.dead.add(node)
        for name, pod in list(self.pods.items()):
            if pod["spec"]["nodeName"] == node:
                del self.pods[name]

    def free(self, node: str) -> int:
        return GPUS_PER_NODE - sum(gpus(pod) for pod in self.pods.values() if pod["spec"]["nodeName"] == node)

    def active(self) -> list[dict[str, Any]]:
        return [pod for pod in self.pods.values() if not self.stopping(pod)]

    def stopping(self, pod: dict[str, Any]) -> bool:
        return "deletionTimestamp" in pod["metadata"]

    def ready(self, pod: dict[str, Any]) -> bool:
        return {"type": "Ready", "status": "True"} in pod["status"]["conditions"]

    def _stop(self, pod: dict[str, Any]) -> None:
        pod["metadata"].setdefault("deletionTimestamp", self._stamp())

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")


class _Perhaps:
    """A call that changes something, and may fail before or after it did."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    def __enter__(self) -> None:
        self.cluster.calls += 1
        self.fault = next(self.cluster.faults, "ok")
        if self.fault == "lost":
            raise Unavailable("the connection broke")
        if self.fault == "conflict":
            raise Conflict("somebody else was first")

    def __exit__(self, *error: object) -> None:
        if self.fault == "late" and error[0] is None:
            raise Unavailable("no answer in time")


def gpus(pod: Mapping[str, Any]) -> int:
    (worker,) = pod["x"]["template"]["spec"]["containers"]
    return int(worker["resources"]["limits"]["nvidia.com/gpu"])


def image(pod: Mapping[str, Any]) -> str:
    (worker,) = pod["x"]["template"]["spec"]["containers"]
    return str(worker["image"])


def run(cluster: FakeCluster) -> Outcome | None:
    """One reconcile; None when a fault ended it."""
    try:
        return asyncio.run(reconcile(KEY, cluster, lambda: cluster.now, SETTINGS))
    except ClusterError:
        return None


def converge(cluster: FakeCluster) -> None:
    """Let time pass until three rounds in a row change nothing."""
    quiet = 0
    for _ in range(60):
        before = copy.deepcopy((cluster.objects, cluster.pods))
        cluster.tick()
        outcome = run(cluster)
        check(cluster)
        same = [cluster.objects, list(cluster.pods)] == [before[0], list(before[1])]
        quiet = quiet + 1 if same and outcome is not None and outcome.actions == 0 else 0
        if quiet == 3:
            return
    pytest.fail(f"no rest: {cluster.app.get('status')}, {[pod['status'] for pod in cluster.pods.values()]}")


def check(cluster: FakeCluster) -> None:
    """What holds at every moment."""
    assert {name for kind, name in cluster.objects} <= {"sdxl"}
    assert {kind for kind, _ in cluster.objects} <= {*API_VERSIONS, "DistributedApp"}
    for node in NODES:
        assert cluster.free(node) >= 0
    # However many GPUs are free, a new group is made only when an old one has been told to go.
    assert not cluster.crowded
    for each in cluster.app.get("status", {}).get("conditions", ()):
        assert each["observedGeneration"] <= cluster.app["metadata"]["generation"]


def check_end(cluster: FakeCluster) -> None:
    """What holds when nothing is left to do."""
    spec, status = cluster.app["spec"], cluster.app["status"]
    found = {each["type"]: each for each in status["conditions"]}
    assert {each["observedGeneration"] for each in status["conditions"]} == {cluster.app["metadata"]["generation"]}
    for kind in API_VERSIONS:
        expected = kind != "NetworkPolicy" or spec.get("networkPolicy") == "DenyAllIngress"
        assert ((kind, "sdxl") in cluster.objects) == expected, kind
        if expected:
            (owner,) = cluster.objects[kind, "sdxl"]["metadata"]["ownerReferences"]
            assert owner["uid"] == cluster.app["metadata"]["uid"]
    wanted = 0 if spec.get("suspend") else spec["replicas"]
    assert cluster.objects["Deployment", "sdxl"]["spec"]["replicas"] == wanted
    ready = (found["Ready"]["status"], found["Ready"]["reason"])
    if spec.get("suspend"):
        assert ready == ("False", "Suspended")
    elif not wanted:
        assert ready == ("True", "ScaledToZero")
    elif spec["image"] == "bad":
        assert ready == ("False", "ImagePullFailed")
        assert "no such image" in found["Ready"]["message"]
        return
    else:
        assert ready == ("True", "Serving")
        assert found["RanksReady"]["status"] == found["Scheduled"]["status"] == found["Available"]["status"] == "True"
    assert found["Progressing"]["reason"] == "Complete"
    assert len(cluster.pods) == status["replicas"] == status["readyReplicas"] == status["updatedReplicas"] == wanted
    assert status["summary"] == f"{wanted}/{wanted}"
    assert {(image(pod), gpus(pod)) for pod in cluster.pods.values()} <= {(spec["image"], spec["numGPUs"])}
    assert {pod["metadata"]["labels"][REVISION] for pod in cluster.pods.values()} <= {status["updateRevision"]}
    assert [group["state"] for group in status["groups"]] == ["Serving"] * wanted


def do(cluster: FakeCluster, step: tuple[str, Any]) -> None:
    what, value = step
    if what == "edit":
        cluster.edit(**value)
    elif what == "tick":
        for _ in range(value):
            cluster.tick()
    elif what == "reconcile":
        run(cluster)
    elif what == "rounds":
        for _ in itertools.islice(rounds(cluster), value):
            check(cluster)
    elif what == "remove":  # somebody deletes a child
        cluster.objects.pop((value, "sdxl"), None)
    elif what == "drift" and (child := cluster.objects.get((value, "sdxl"))):
        field = {"Deployment": "replicas", "PodDisruptionBudget": "maxUnavailable"}.get(value, "ports")
        child["spec"][field] = 7 if field != "ports" else []
        child["metadata"]["labels"].pop(APP, None)
    elif what == "kill pod":
        for pod in list(cluster.pods.values())[: value + 1][value:]:
            del cluster.pods[pod["metadata"]["name"]]
    elif what == "kill node":
        cluster.kill_node(value)
    elif what == "new node":
        cluster.dead.discard(value)
    elif what == "recreate":  # kubectl replace --force
        cluster.create_app(**value)


edits = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["a:1", "a:2", "bad"]),
        "replicas": st.integers(0, 3),
        "numGPUs": st.sampled_from([1, 2]),
        "suspend": st.booleans(),
        "networkPolicy": st.sampled_from(["Disabled", "DenyAllIngress"]),
        "rollout": st.sampled_from([{"type": "Auto"}, {"type": "Recreate"}]),
    },
)
steps = st.one_of(
    st.tuples(st.just("edit"), edits),
    st.tuples(st.just("tick"), st.integers(1, 4)),
    st.tuples(st.just("reconcile"), st.none()),
    st.tuples(st.just("rounds"), st.integers(1, 6)),
    st.tuples(st.just("remove"), st.sampled_from(sorted(API_VERSIONS))),
    st.tuples(st.just("drift"), st.sampled_from(["Deployment", "PodDisruptionBudget", "Service"])),
    st.tuples(st.just("kill pod"), st.integers(0, 2)),
    st.tuples(st.just("kill node"), st.sampled_from(NODES)),
    st.tuples(st.just("new node"), st.sampled_from(NODES)),
    st.tuples(st.just("recreate"), edits),
)
faults = st.lists(st.sampled_from(["ok", "ok", "lost", "late", "conflict"]), max_size=20)


@settings(max_examples=150)
@given(first=edits, story=st.lists(steps, max_size=12), broken=faults)
@example(
    first={"networkPolicy": "DenyAllIngress"},
    story=[("rounds", 2), ("edit", {"networkPolicy": "Disabled"})],
    broken=["ok", "ok", "lost", "late"],
)
@example(first={"replicas": 3}, story=[("tick", 4), ("reconcile", None), ("edit", {"image": "bad"})], broken=[])
def test_it_converges(first: dict[str, Any], story: list[tuple[str, Any]], broken: list[str]) -> None:
    cluster = FakeCluster(broken)
    cluster.create_app(**first)
    for step in story:
        do(cluster, step)
        check(cluster)
    cluster.dead.clear()
    converge(cluster)
    check_end(cluster)


def rounds(cluster: FakeCluster) -> Iterator[Outcome | None]:
    while True:
        yield run(cluster)
        cluster.tick()


@pytest.mark.parametrize("fault", ["lost", "late", "conflict"])
def test_an_operator_that_dies_at_any_call(fault: str) -> None:
    calm = FakeCluster()
    calm.create_app(replicas=2, networkPolicy="DenyAllIngress")
    converge(calm)
    assert calm.calls > 5
    for number in range(calm.calls):
        cluster = FakeCluster(["ok"] * number + [fault])
        cluster.create_app(replicas=2, networkPolicy="DenyAllIngress")
        converge(cluster)
        check_end(cluster)


def test_one_gpu_set_is_handed_over() -> None:
    """Four GPUs for a group of four: the new revision starts when the old one has gone, and is never starved."""
    cluster = FakeCluster()
    cluster.dead.add("n2")
    cluster.create_app(numGPUs=4)
    converge(cluster)
    cluster.edit(image="a:2")
    seen = set()
    for outcome in itertools.islice(rounds(cluster), 12):
        assert outcome is not None
        assert len([pod for pod in cluster.pods.values() if pod["spec"]["nodeName"]]) <= 1
        seen.add(next(each["reason"] for each in cluster.app["status"]["conditions"] if each["type"] == "Ready"))
    converge(cluster)
    check_end(cluster)
    assert {"InsufficientGPUs", "Serving"} <= seen
    assert "Deployment: spec.template.spec.containers[worker].image: 'a:1' -> 'a:2'" in dict(cluster.events).values()


def test_too_few_gpus_are_named_in_the_schedulers_words() -> None:
    cluster = FakeCluster()
    cluster.create_app(replicas=3, numGPUs=4)
    for _ in itertools.islice(rounds(cluster), 8):
        check(cluster)
    found = {each["type"]: each for each in cluster.app["status"]["conditions"]}
    assert (found["Scheduled"]["status"], found["Scheduled"]["reason"]) == ("False", "InsufficientGPUs")
    assert "0/2 nodes are available: 2 Insufficient nvidia.com/gpu." in found["Scheduled"]["message"]
    # Two of three groups serve, and one may be missing.
    assert found["Ready"]["reason"] == "Serving"
    cluster.edit(replicas=2)
    converge(cluster)
    check_end(cluster)


def test_a_bad_rollout_keeps_the_old_revision() -> None:
    cluster = FakeCluster()
    cluster.create_app(replicas=3, numGPUs=2)
    converge(cluster)
    good = cluster.app["status"]["currentRevision"]
    cluster.edit(image="bad")
    converge(cluster)
    check_end(cluster)
    status = cluster.app["status"]
    assert (status["currentRevision"], status["readyReplicas"]) == (good, 2)
    assert {each["type"]: each["status"] for each in status["conditions"]}["Available"] == "True"
    cluster.edit(image="a:2")
    converge(cluster)
    check_end(cluster)
