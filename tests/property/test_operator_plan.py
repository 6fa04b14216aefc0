"""The operator against a simulated cluster that ages pods, loses writes, kills nodes and is edited by people.

``reconcile`` is the real one, over a port of plain data. Whatever happens, in the end the app is as its spec says, with
one child of each kind, and the operator has nothing left to do.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_cluster import (
    KEY,
    NODES,
    WRITES,
    Death,
    Faults,
    SimulatedCluster,
    copied,
    gpus,
    image,
    revision,
    stopping,
)

from drumline_operator.cluster import ClusterError
from drumline_operator.manifests.labels import APP
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.reconcile import Load, Outcome, reconcile
from drumline_operator.settings import OperatorSettings

pytestmark = pytest.mark.timeout(90)  # each is a hundred stories of an app's life: 2 s of CPU time
SETTINGS = OperatorSettings()
LOOP = asyncio.Runner()  # one for all: a thousand reconciles in a test
MACHINE = {"nodeSelector": {"pool": "gpu"}, "aliases": ["GPU"]}
#: What somebody else has made; the operator never touches it.
SQUATTER = "somebody else's"


def run(cluster: SimulatedCluster) -> Outcome | None:
    """One reconcile; None when a fault or the operator's death ended it."""
    try:
        return LOOP.run(reconcile(KEY, cluster, lambda: cluster.now, SETTINGS, cluster.load))
    except (ClusterError, Death):
        return None


class Busy(Load):
    """A queue with other keys for a while: runs give way, and progress is told later."""

    def __init__(self, busy: list[bool]) -> None:
        self._busy = iter(busy)

    def others_wait(self) -> bool:
        return next(self._busy, False)

    def until_told(self) -> float:
        return 1.0 * next(self._busy, False)


def converge(cluster: SimulatedCluster) -> None:
    """Let time pass until three rounds in a row change nothing and ask for nothing."""
    quiet = 0
    for _ in range(80):
        before = copied((cluster.objects, list(cluster.pods)))
        cluster.tick()
        cluster.deliver()
        outcome = run(cluster)
        check(cluster)
        same = (cluster.objects, list(cluster.pods)) == before
        quiet = quiet + 1 if same and outcome is not None and outcome.actions == 0 else 0
        if quiet == 3:
            return
    pytest.fail(f"no rest: {cluster.app.get('status')}, {[pod['status'] for pod in cluster.pods.values()]}")


def check(cluster: SimulatedCluster) -> None:
    """What holds at every moment."""
    children = Counter(kind for kind, _ in cluster.objects)
    assert {name for kind, name in cluster.objects if kind in API_VERSIONS} <= {"sdxl"}
    assert children.keys() <= {*API_VERSIONS, "DistributedApp", "ConfigMap", "MachineType"}
    for node in NODES:
        assert cluster.free(node) >= 0
    # However many GPUs are free, a new group is made only when an old one has been told to go.
    assert not cluster.crowded
    for (kind, name), each in cluster.objects.items():
        if SQUATTER in each:
            assert each[SQUATTER] == {"kind": kind, "name": name}
    app = cluster.objects.get(("DistributedApp", "sdxl"))
    for each in (app or {}).get("status", {}).get("conditions", ()):
        assert each["observedGeneration"] <= cluster.app["metadata"]["generation"]


def check_end(cluster: SimulatedCluster) -> None:
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
    assert {revision(pod) for pod in cluster.pods.values()} <= {status["updateRevision"]}
    assert [group["state"] for group in status.get("groups", ())] == ["Serving"] * wanted


def do(cluster: SimulatedCluster, step: tuple[str, Any]) -> None:
    """One step of a story; those that make no sense now do nothing."""
    what, value = step
    exists = ("DistributedApp", "sdxl") in cluster.objects
    if what == "edit" and exists:
        cluster.edit(**value)
    elif what == "tick":
        for _ in range(value):
            cluster.tick()
    elif what == "deliver":
        cluster.deliver()
    elif what == "reconcile":
        run(cluster)
    elif what == "rounds":
        for _ in itertools.islice(rounds(cluster), value):
            check(cluster)
    elif what == "remove":  # somebody deletes a child
        cluster.objects.pop((value, "sdxl"), None)
    elif what == "drift" and (child := cluster.objects.get((value, "sdxl"))) and SQUATTER not in child:
        field = {"Deployment": "replicas", "PodDisruptionBudget": "maxUnavailable"}.get(value, "ports")
        child["spec"][field] = 7 if field != "ports" else []
        child["metadata"]["labels"].pop(APP, None)
    elif what == "again" and (child := cluster.objects.get((value[0], "sdxl"))) and SQUATTER not in child:
        if value[0] == "Service":
            cluster.make_again("Service", clusterIP="None")
        else:
            theirs = {"else": "x"}
            template = copied(child["spec"]["template"])
            ours = template["metadata"]["labels"] if value[1] else {}
            template["metadata"]["labels"] = {**ours, **theirs}
            cluster.make_again("Deployment", selector={"matchLabels": theirs}, template=template)
    elif what == "squat" and (value, "sdxl") not in cluster.objects:
        cluster.put(value, "sdxl", spec={}, **{SQUATTER: {"kind": value, "name": "sdxl"}})
    elif what == "kill pod":
        for pod in list(cluster.pods.values())[: value + 1][value:]:
            del cluster.pods[pod["metadata"]["name"]]
    elif what == "kill node":
        cluster.kill_node(value)
    elif what == "new node":
        cluster.dead.discard(value)
    elif what == "recreate":  # kubectl replace --force
        cluster.create_app(**value)
    elif what == "delete":
        cluster.objects.pop(("DistributedApp", "sdxl"), None)
    elif what == "code":
        cluster.put("ConfigMap", "code", data={"app.py": value})
    elif what == "no code":
        cluster.objects.pop(("ConfigMap", "code"), None)
    elif what == "machine":
        cluster.put("MachineType", "gpu", spec={**MACHINE, "env": [{"name": "A", "value": value}]})
    elif what == "no machine":
        cluster.objects.pop(("MachineType", "gpu"), None)


def rounds(cluster: SimulatedCluster) -> Iterator[Outcome | None]:
    """Reconcile after reconcile, with time and watches between them."""
    while True:
        yield run(cluster)
        cluster.tick()
        cluster.deliver()


def settle(cluster: SimulatedCluster) -> None:
    """What stands in the way is cleared, and all comes to rest."""
    cluster.dead.clear()
    for key in [key for key, each in cluster.objects.items() if SQUATTER in each]:
        del cluster.objects[key]
    if ("DistributedApp", "sdxl") not in cluster.objects:
        cluster.create_app()
    do(cluster, ("code", "z"))
    do(cluster, ("machine", "z"))
    converge(cluster)
    check_end(cluster)


edits = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["a:1", "a:2", "bad"]),
        "replicas": st.integers(0, 3),
        "numGPUs": st.sampled_from([1, 2]),
        "suspend": st.booleans(),
        "networkPolicy": st.sampled_from(["Disabled", "DenyAllIngress"]),
        "rollout": st.sampled_from([{"type": "Auto"}, {"type": "Recreate"}]),
        "source": st.sampled_from([None, {"configMap": {"name": "code"}}]),
        "machineType": st.sampled_from([None, "gpu", "GPU"]),
        "failurePolicy": st.sampled_from([{"type": "RestartGroup"}, {"type": "RecreatePod"}]),
    },
)
#: What may happen at any moment, also in the middle of a reconcile.
incidents = st.one_of(
    st.tuples(st.just("edit"), edits),
    st.tuples(st.just("tick"), st.integers(1, 4)),
    st.tuples(st.just("deliver"), st.none()),
    st.tuples(st.just("remove"), st.sampled_from(sorted(API_VERSIONS))),
    st.tuples(st.just("drift"), st.sampled_from(["Deployment", "PodDisruptionBudget", "Service"])),
    st.tuples(st.just("again"), st.tuples(st.sampled_from(["Deployment", "Service"]), st.booleans())),
    st.tuples(st.just("squat"), st.sampled_from(sorted(API_VERSIONS))),
    st.tuples(st.just("kill pod"), st.integers(0, 2)),
    st.tuples(st.just("kill node"), st.sampled_from(NODES)),
    st.tuples(st.just("new node"), st.sampled_from(NODES)),
    st.tuples(st.just("recreate"), edits),
    st.tuples(st.just("delete"), st.none()),
    st.tuples(st.just("code"), st.sampled_from("ab")),
    st.tuples(st.just("no code"), st.none()),
    st.tuples(st.just("machine"), st.sampled_from("ab")),
    st.tuples(st.just("no machine"), st.none()),
)
steps = st.one_of(
    incidents,
    st.tuples(st.just("reconcile"), st.none()),
    st.tuples(st.just("rounds"), st.integers(1, 6)),
)
faults = st.lists(st.sampled_from(["ok", "ok", "lost", "late", "conflict"]), max_size=20)


@settings(max_examples=100)
@given(
    first=edits,
    story=st.lists(steps, max_size=12),
    broken=faults,
    lagging=st.booleans(),
    busy=st.lists(st.booleans(), max_size=20),
)
@example(
    first={"networkPolicy": "DenyAllIngress"},
    story=[("rounds", 2), ("edit", {"networkPolicy": "Disabled"})],
    broken=["ok", "ok", "lost", "late"],
    lagging=False,
    busy=[],
)
@example(
    first={"replicas": 3},
    story=[("tick", 4), ("reconcile", None), ("edit", {"image": "bad"})],
    broken=[],
    lagging=False,
    busy=[True] * 5,
)
@example(first={}, story=[("squat", "Service"), ("rounds", 3), ("recreate", {})], broken=[], lagging=True, busy=[])
def test_it_converges(
    first: dict[str, Any], story: list[tuple[str, Any]], broken: list[str], lagging: bool, busy: list[bool]
) -> None:
    cluster = SimulatedCluster(Faults(broken), lagging=lagging)
    cluster.load = Busy(busy)
    cluster.create_app(**first)
    for step in story:
        do(cluster, step)
        check(cluster)
    settle(cluster)


@settings(max_examples=100)
@given(
    first=edits,
    story=st.lists(steps, max_size=5),
    between=st.dictionaries(st.integers(0, 40), incidents, max_size=6),
    lagging=st.booleans(),
)
def test_what_happens_in_the_middle_of_a_reconcile(
    first: dict[str, Any], story: list[tuple[str, Any]], between: dict[int, tuple[str, Any]], lagging: bool
) -> None:
    """Between any two calls somebody edits, deletes, kills, or the cluster moves on."""

    def interrupt(number: int, call: str, when: str) -> None:
        if when == "before" and number in between:
            do(cluster, between[number])

    cluster = SimulatedCluster(interrupt, lagging=lagging)
    cluster.create_app(**first)
    for step in story:
        do(cluster, step)
        check(cluster)
    cluster.interrupt = lambda number, call, when: None
    settle(cluster)


# --- deaths and faults at every call in turn


def life(cluster: SimulatedCluster) -> None:
    """An app's life: made, served, changed, suspended, resumed, with code, on a machine."""
    cluster.create_app(replicas=2, networkPolicy="DenyAllIngress", source={"configMap": {"name": "code"}})
    do(cluster, ("code", "a"))
    for change in (
        {},
        {"image": "a:2", "machineType": "GPU"},
        {"suspend": True, "networkPolicy": "Disabled"},
        {"suspend": False, "replicas": 1},
    ):
        do(cluster, ("machine", "a"))
        cluster.edit(**change)
        for _ in itertools.islice(rounds(cluster), 2):
            check(cluster)
    settle(cluster)


class DiesAt:
    """An interrupt: the operator is gone at one call, which was done or not. Also writes down what the calls are."""

    def __init__(self, number: int = -1, when: str = "before") -> None:
        self.moment = (number, when)
        self.moments: list[tuple[int, str]] = []

    def __call__(self, number: int, call: str, when: str) -> None:
        if when == "before" or call in WRITES:  # whether a read was done makes no difference
            self.moments.append((number, when))
        if (number, when) == self.moment:
            raise Death


#: The test is cut in parts, so that each stays short.
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_an_operator_that_dies_at_any_call(part: int) -> None:
    calm = DiesAt()
    life(SimulatedCluster(calm))
    assert len(calm.moments) > 150
    for number, when in calm.moments[part::PARTS]:
        life(SimulatedCluster(DiesAt(number, when)))


def test_a_second_plan_is_empty_and_writes_nothing() -> None:
    cluster = SimulatedCluster()
    life(cluster)
    before = cluster.writes, len(cluster.events), copied(cluster.objects)
    for _ in range(20):
        outcome = run(cluster)
        assert outcome is not None
        assert outcome.actions == 0
    assert (cluster.writes, len(cluster.events), cluster.objects) == before


def test_events_are_not_repeated() -> None:
    """One event for each change of the verdict, however often it is looked at."""
    cluster = SimulatedCluster()
    cluster.create_app()
    for _ in itertools.islice(rounds(cluster), 30):
        check(cluster)
    assert max(Counter(cluster.events).values()) == 1


# --- stories


def test_one_gpu_set_is_handed_over() -> None:
    """Four GPUs for a group of four: the new revision starts when the old one has gone, and is never starved."""
    cluster = SimulatedCluster()
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
    cluster = SimulatedCluster()
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


def test_nodes_that_stay_dead() -> None:
    """What fits on the nodes that are left runs there; the rest says why not, and nothing is written over and over."""
    cluster = SimulatedCluster()
    do(cluster, ("machine", "a"))
    cluster.create_app(replicas=3, numGPUs=2, machineType="gpu")
    converge(cluster)
    cluster.kill_node("n1")
    converge(cluster)
    status = cluster.app["status"]
    found = {each["type"]: each for each in status["conditions"]}
    assert status["summary"] == "2/3"
    assert found["Scheduled"]["reason"] == "InsufficientGPUs"
    cluster.kill_node("n2")
    converge(cluster)
    found = {each["type"]: each for each in cluster.app["status"]["conditions"]}
    assert (found["Ready"]["status"], found["Ready"]["reason"]) == ("False", "NoMatchingMachineType")
    assert "gpu has 0 nodes" in found["Ready"]["message"]
    cluster.dead.clear()
    converge(cluster)
    check_end(cluster)


def test_a_bad_rollout_keeps_the_old_revision() -> None:
    cluster = SimulatedCluster()
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


@pytest.mark.parametrize("ours", [True, False], ids=["led to by the Service", "of another selector"])
def test_a_deployment_of_another_selector_is_made_anew(ours: bool) -> None:
    """Pods that the Service leads to go on until a rollout replaces them; others go with their Deployment."""
    cluster = SimulatedCluster()
    cluster.create_app(replicas=2)
    converge(cluster)
    do(cluster, ("again", ("Deployment", ours)))
    for _ in range(6):  # its pods are made and become ready
        cluster.tick()
    theirs, least, anew = {*cluster.pods}, 2, False
    for _ in itertools.islice(rounds(cluster), 30):
        check(cluster)
        live = cluster.objects.get(("Deployment", "sdxl"))
        anew |= live is None
        serving = [pod for pod in cluster.pods.values() if not stopping(pod) and APP in pod["metadata"]["labels"]]
        least = min(least, len(serving))
    converge(cluster)
    check_end(cluster)
    assert anew or cluster.objects["Deployment", "sdxl"]["spec"]["selector"]["matchLabels"].keys() == {APP}
    assert not theirs & {*cluster.pods}
    assert (least >= 1) == ours
    assert any(reason == "MadeAnew" and "selector" in words for reason, words in cluster.events)


def test_a_child_that_comes_back_wrong_is_made_anew_now_and_then() -> None:
    """E.g. an admission webhook that changes it."""
    cluster = SimulatedCluster()
    cluster.create_app()
    converge(cluster)
    began, uids = cluster.now, set()
    for _ in itertools.islice(rounds(cluster), 60):
        check(cluster)
        if ("Service", "sdxl") in cluster.objects:
            if cluster.objects["Service", "sdxl"]["spec"].get("clusterIP") is None:
                cluster.make_again("Service", clusterIP="None")
            uids.add(cluster.objects["Service", "sdxl"]["metadata"]["uid"])
    assert 3 <= len(uids) <= (cluster.now - began).total_seconds() / SETTINGS.replace_interval + 1


def test_pods_that_crash_are_replaced_now_and_then() -> None:
    """With RecreatePod; a new pod knows nothing of the kubelet's back-off, so the operator has its own."""
    cluster = SimulatedCluster()
    cluster.create_app(image="crash", failurePolicy={"type": "RecreatePod"})
    names, began = set(), cluster.now
    for _ in itertools.islice(rounds(cluster), 100):
        check(cluster)
        names |= {name for name, pod in cluster.pods.items() if not stopping(pod)}
    elapsed = (cluster.now - began).total_seconds()
    assert 3 <= len(names) <= elapsed / SETTINGS.replace_interval + 1
    found = {each["type"]: each for each in cluster.app["status"]["conditions"]}
    assert found["Ready"]["status"] == "False"
    cluster.edit(image="a:1")
    converge(cluster)
    check_end(cluster)


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    with LOOP:
        yield
