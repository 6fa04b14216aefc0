"""The CRDs and the operator against a real API server: what it accepts, refuses, defaults and prunes."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio.client import Configuration

from drumline.api.v1alpha1 import API_VERSION
from drumline_operator.cluster import ClusterError, Conflict, Refused, Unavailable
from drumline_operator.kube import RESOURCES, KubeCluster
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.reconcile import Outcome, reconcile
from drumline_operator.settings import OperatorSettings

GOOD = yaml.safe_load((Path(__file__).parents[1] / "data" / "manifests" / "good.yaml").read_text())
SETTINGS = OperatorSettings(worker_image="base:1")


def app(name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"}
    full = {"image": "a:1", "workerClass": "app:W", **spec}
    return {"apiVersion": API_VERSION, "kind": "DistributedApp", "metadata": metadata, "spec": full}


def manifest(sample: dict[str, Any], name: str) -> dict[str, Any]:
    if "app" in sample:
        return {**app(name), "spec": sample["app"]}
    return {"apiVersion": API_VERSION, "kind": "MachineType", "metadata": {"name": name}, "spec": sample["machine"]}


async def run(cluster: KubeCluster, name: str, kind: str = "DistributedApp") -> Outcome:
    key = f"default/{name}" if kind == "DistributedApp" else f"machinetype:{name}"
    return await reconcile(key, cluster, lambda: datetime.now(UTC), SETTINGS)


def ready(raw: Any) -> dict[str, Any]:
    return next(each for each in raw["status"]["conditions"] if each["type"] in {"Ready", "Available"})


@pytest.mark.parametrize("name", sorted(GOOD))
async def test_the_second_run_has_nothing_to_do(cluster: KubeCluster, name: str) -> None:
    """Also where the API server adds defaults, and rewrites quantities."""
    document = manifest(GOOD[name], f"a{sorted(GOOD).index(name)}")
    if (document["spec"].get("source") or {}).get("configMap"):
        code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "sdxl-code", "namespace": "default"}}
        await cluster.apply({**code, "data": {"app.py": ""}})
    if machine := document["spec"].get("machineType"):
        await cluster.apply(manifest({"machine": {"aliases": [machine]}}, "h100"))
    await cluster.apply(document)
    first = await run(cluster, document["metadata"]["name"], document["kind"])
    assert first.actions
    second = await run(cluster, document["metadata"]["name"], document["kind"])
    assert second.actions == (second.again is not None)
    raw = await cluster.get(document["kind"], "default", document["metadata"]["name"])
    assert ready(raw)["observedGeneration"] == 1


async def test_a_pod_template_that_no_server_takes(cluster: KubeCluster) -> None:
    await cluster.apply(app("junk", podTemplate={"spec": {"containers": [{"name": "worker", "ports": "x"}]}}))
    with pytest.raises(Refused):
        await run(cluster, "junk")
    found = ready(await cluster.get("DistributedApp", "default", "junk"))
    assert (found["status"], found["reason"]) == ("False", "RefusedByServer")
    assert "ports" in found["message"]


async def test_drift_is_repaired_and_told(cluster: KubeCluster) -> None:
    await cluster.apply(app("drift", replicas=2))
    await run(cluster, "drift")
    path = RESOURCES["Deployment"].path("default", "drift")
    await cluster._call("PATCH", path, body={"spec": {"replicas": 9}}, content_type="application/merge-patch+json")
    await run(cluster, "drift")
    live = await cluster.get("Deployment", "default", "drift")
    assert live is not None
    assert live["spec"]["replicas"] == 2
    events = await cluster.list("Event", "default")
    assert "Deployment: spec.replicas: 9 -> 2" in [each["message"] for each in events]
    service = await cluster.get("Service", "default", "drift")
    assert service is not None
    await cluster.delete("Service", "default", "drift", service["metadata"]["uid"])
    assert (await run(cluster, "drift")).actions
    assert await cluster.get("Service", "default", "drift")


async def patched(cluster: KubeCluster, kind: str, name: str, *operations: dict[str, Any]) -> None:
    """What somebody does with `kubectl patch --type=json`."""
    path, somebody = RESOURCES[kind].path("default", name), {"fieldManager": "kubectl-patch"}
    await cluster._call("PATCH", path, somebody, operations, "application/json-patch+json")


PORT = "/spec/ports/0"
POD = "/spec/template/spec"
WORKER = f"{POD}/containers/0"
DRIFTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "port": ("Service", [{"op": "replace", "path": f"{PORT}/port", "value": 9}]),
    "port name": ("Service", [{"op": "replace", "path": f"{PORT}/name", "value": "web"}]),
    "protocol": ("Service", [{"op": "replace", "path": f"{PORT}/protocol", "value": "UDP"}]),
    "target port": ("Service", [{"op": "replace", "path": f"{PORT}/targetPort", "value": 9}]),
    "port of another name beside another port": (
        "Service",
        [
            {"op": "replace", "path": f"{PORT}/port", "value": 9},
            {"op": "add", "path": "/spec/ports/-", "value": {"name": "more", "port": 10}},
        ],
    ),
    "container port": ("Deployment", [{"op": "replace", "path": f"{WORKER}/ports/0/containerPort", "value": 9}]),
    "probe": (
        "Deployment",
        [{"op": "replace", "path": f"{WORKER}/readinessProbe", "value": {"exec": {"command": ["true"]}}}],
    ),
    "volume": (
        "Deployment",
        [{"op": "replace", "path": f"{POD}/volumes/2", "value": {"name": "shm", "hostPath": {"path": "/"}}}],
    ),
    "volume without any field": (
        "Deployment",
        [{"op": "replace", "path": f"{POD}/volumes/0", "value": {"name": "tmp", "hostPath": {"path": "/"}}}],
    ),
    "no service account's token": ("Deployment", [{"op": "remove", "path": f"{POD}/automountServiceAccountToken"}]),
    "no more privileges": (
        "Deployment",
        [{"op": "remove", "path": f"{WORKER}/securityContext/allowPrivilegeEscalation"}],
    ),
    "selector of pods": ("PodDisruptionBudget", [{"op": "replace", "path": "/spec/selector", "value": {}}]),
}


@pytest.mark.parametrize("drift", DRIFTS)
async def test_what_somebody_changed_so_that_both_do_not_fit_is_replaced(cluster: KubeCluster, drift: str) -> None:
    """A server-side apply alone would put ours beside theirs, and be refused for ever."""
    name = f"fits-{sorted(DRIFTS).index(drift)}"
    kind, operations = DRIFTS[drift]
    await cluster.apply(app(name))
    await run(cluster, name)
    before = await cluster.get(kind, "default", name)
    assert before is not None
    label = {"op": "add", "path": "/metadata/labels/theirs", "value": "stays"}
    await patched(cluster, kind, name, label, *operations)
    await run(cluster, name)
    live = await cluster.get(kind, "default", name)
    assert live is not None
    assert live["spec"] == before["spec"]
    assert live["metadata"]["uid"] == before["metadata"]["uid"]
    assert live["metadata"]["labels"]["theirs"] == "stays"
    assert ready(await cluster.get("DistributedApp", "default", name))["reason"] == "Starting"
    assert (await run(cluster, name)).actions == 0
    ours = [each["operation"] for each in live["metadata"]["managedFields"] if each["manager"] == "drumline-operator"]
    assert ours == ["Apply"]  # else what an apply leaves out later would stay


#: All that the API server leaves out when it is empty, false or 0, as people write it down nevertheless.
EMPTY = {
    "metadata": {"labels": {}, "annotations": {}},
    "spec": {
        **dict.fromkeys(["hostIPC", "hostNetwork", "hostPID"], False),
        "nodeSelector": {},
        "overhead": {},
        "tolerations": [],
        "hostname": "",
        "subdomain": "",
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "podAffinityTerm": {"topologyKey": "x", "labelSelector": {"matchLabels": {}}}}
                ]
            }
        },
        "containers": [
            {
                "name": "worker",
                **dict.fromkeys(["stdin", "stdinOnce", "tty"], False),
                "command": [],
                "env": [{"name": "EMPTY", "value": ""}],
                "ports": [{"name": "more", "containerPort": 9, "hostPort": 0}],
                "volumeMounts": [{"name": "nfs", "mountPath": "/nfs", "readOnly": False, "subPath": ""}],
                "readinessProbe": {"initialDelaySeconds": 0},
            }
        ],
        "volumes": [
            {"name": "nfs", "nfs": {"server": "a", "path": "/a", "readOnly": False}},
            {"name": "disk", "gcePersistentDisk": {"pdName": "a", "partition": 0, "readOnly": False}},
            {"name": "csi", "csi": {"driver": "a.b", "volumeAttributes": {}}},
            {"name": "flex", "flexVolume": {"driver": "a/b", "options": {}, "readOnly": False}},
            {
                "name": "iscsi",
                "iscsi": {
                    "targetPortal": "1.2.3.4:9",
                    "iqn": "iqn.2001-04.com.example:a",
                    "lun": 0,
                    "readOnly": False,
                    "chapAuthDiscovery": False,
                    "chapAuthSession": False,
                },
            },
        ],
    },
}
#: What it keeps though it is empty, false or 0, and where that is in the Deployment.
KEPT = {
    "emptyDir": (f"{POD}/volumes/0/emptyDir", {}),
    "enableServiceLinks": (f"{POD}/enableServiceLinks", False),
    "automountServiceAccountToken": (f"{POD}/automountServiceAccountToken", False),
    "hostUsers": (f"{POD}/hostUsers", False),
    "shareProcessNamespace": (f"{POD}/shareProcessNamespace", False),
    "setHostnameAsFQDN": (f"{POD}/setHostnameAsFQDN", False),
    "affinity": (f"{POD}/affinity/podAffinity", {}),
    "privileged": (f"{WORKER}/securityContext/privileged", False),
    "allowPrivilegeEscalation": (f"{WORKER}/securityContext/allowPrivilegeEscalation", False),
    "user": (f"{WORKER}/securityContext/runAsUser", 0),
    "optional": (f"{WORKER}/envFrom/0/secretRef/optional", False),
    "tolerationSeconds": (f"{POD}/tolerations/0/tolerationSeconds", 0),
}
KEEPS = {
    "spec": {
        **dict.fromkeys(["hostUsers", "shareProcessNamespace", "setHostnameAsFQDN"], False),
        "affinity": {"podAffinity": {}},
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}],
        "containers": [
            {
                "name": "worker",
                "envFrom": [{"secretRef": {"name": "a", "optional": False}}],
                "securityContext": {"privileged": False, "runAsUser": 0, "runAsNonRoot": False},
            }
        ],
    }
}


async def test_what_the_server_leaves_out_because_it_is_empty_is_no_drift(cluster: KubeCluster) -> None:
    await cluster.apply(app("empties", podTemplate=EMPTY))
    await run(cluster, "empties")
    assert (await run(cluster, "empties")).actions == 0


@pytest.mark.parametrize("field", KEPT)
async def test_what_is_empty_and_means_something_comes_back(cluster: KubeCluster, field: str) -> None:
    path, value = KEPT[field]
    name = f"kept-{sorted(KEPT).index(field)}"
    await cluster.apply(app(name, podTemplate=KEEPS))
    await run(cluster, name)
    before = await cluster.get("Deployment", "default", name)
    assert before is not None
    assert (await run(cluster, name)).actions == 0
    gone = [{"op": "test", "path": path, "value": value}, {"op": "remove", "path": path}]
    if field == "emptyDir":  # the server itself puts that one back
        gone.append({"op": "add", "path": path.removesuffix("/emptyDir") + "/hostPath", "value": {"path": "/"}})
    await patched(cluster, "Deployment", name, *gone)
    await run(cluster, name)
    live = await cluster.get("Deployment", "default", name)
    assert live is not None
    assert live["spec"] == before["spec"]


async def test_a_port_that_somebody_adds_is_theirs(cluster: KubeCluster) -> None:
    await cluster.apply(app("added"))
    await run(cluster, "added")
    extra = {"name": "more", "port": 9, "protocol": "TCP", "targetPort": 9}
    await patched(cluster, "Service", "added", {"op": "add", "path": "/spec/ports/-", "value": extra})
    assert (await run(cluster, "added")).actions == 0
    await cluster.apply(app("added", serving={"port": 9000}))
    await run(cluster, "added")
    live = await cluster.get("Service", "default", "added")
    assert live is not None
    assert {each["name"]: each["port"] for each in live["spec"]["ports"]} == {"http": 9000, "more": 9}


async def test_what_a_repair_has_set_goes_when_the_app_drops_it(cluster: KubeCluster) -> None:
    await cluster.apply(app("drops", env=[{"name": "A", "value": "1"}]))
    await run(cluster, "drops")
    port = {"op": "replace", "path": f"{WORKER}/ports/0/containerPort", "value": 9}
    await patched(cluster, "Deployment", "drops", port)
    await run(cluster, "drops")
    await cluster.apply(app("drops"))
    await run(cluster, "drops")
    live = await cluster.get("Deployment", "default", "drops")
    assert live is not None
    worker = live["spec"]["template"]["spec"]["containers"][0]
    assert "A" not in {each["name"] for each in worker["env"]}


@pytest.mark.parametrize("kind", ["Deployment", "Service"])
async def test_what_only_making_it_anew_can_change_is_made_anew(cluster: KubeCluster, kind: str) -> None:
    """Somebody has deleted a child and made it again, as ours but for what never changes."""
    name = f"anew-{kind.lower()}"
    await cluster.apply(app(name))
    await run(cluster, name)
    ours = await cluster.get(kind, "default", name)
    assert ours is not None
    await cluster.delete(kind, "default", name, ours["metadata"]["uid"])
    theirs = copy.deepcopy(dict(ours))
    for key in ("uid", "resourceVersion", "managedFields", "creationTimestamp", "generation"):
        theirs["metadata"].pop(key, None)
    if kind == "Service":
        theirs["spec"] |= {"clusterIP": "None", "clusterIPs": ["None"]}
        theirs["spec"]["ports"][0]["port"] = 9
    else:
        theirs["spec"]["selector"] = {"matchLabels": {"else": "x"}}
        theirs["spec"]["template"]["metadata"]["labels"] = {"else": "x"}
    made = await cluster.create(theirs)
    waits = await run(cluster, name)  # it is too young
    assert waits.again is not None
    assert 0 < waits.again <= SETTINGS.replace_interval
    later = datetime.now(UTC) + timedelta(seconds=SETTINGS.replace_interval)
    await reconcile(f"default/{name}", cluster, lambda: later, SETTINGS)
    assert await cluster.get(kind, "default", name) is None
    await run(cluster, name)
    live = await cluster.get(kind, "default", name)
    assert live is not None
    assert live["metadata"]["uid"] not in {made["metadata"]["uid"], ours["metadata"]["uid"]}
    changed = {"clusterIP", "clusterIPs"}
    assert {k: v for k, v in live["spec"].items() if k not in changed} == {
        k: v for k, v in ours["spec"].items() if k not in changed
    }
    assert (await run(cluster, name)).actions == 0
    events = [each["message"] for each in await cluster.list("Event", "default")]
    assert any(each.startswith(f"{kind} is deleted and made anew: spec.") for each in events)


async def test_pods_of_a_deployment_that_the_service_leads_to_go_on(cluster: KubeCluster) -> None:
    """It is deleted without what it owns."""
    await cluster.apply(app("orphans"))
    await run(cluster, "orphans")
    ours = await cluster.get("Deployment", "default", "orphans")
    assert ours is not None
    await cluster.delete("Deployment", "default", "orphans", ours["metadata"]["uid"])
    theirs = copy.deepcopy(dict(ours))
    for key in ("uid", "resourceVersion", "managedFields", "creationTimestamp", "generation"):
        theirs["metadata"].pop(key, None)
    theirs["spec"]["selector"]["matchLabels"]["more"] = "x"
    theirs["spec"]["template"]["metadata"]["labels"]["more"] = "x"
    await cluster.create(theirs)
    later = datetime.now(UTC) + timedelta(seconds=SETTINGS.replace_interval)
    await reconcile("default/orphans", cluster, lambda: later, SETTINGS)
    live = await cluster.get("Deployment", "default", "orphans")
    assert live is not None
    assert live["metadata"]["deletionTimestamp"]
    assert live["metadata"]["finalizers"] == ["orphan"]  # for the garbage collector, which there is none of here
    assert (await run(cluster, "orphans")).again is not None
    await patched(cluster, "Deployment", "orphans", {"op": "remove", "path": "/metadata/finalizers"})
    await run(cluster, "orphans")
    live = await cluster.get("Deployment", "default", "orphans")
    assert live is not None
    assert live["spec"] == ours["spec"]


async def test_why_a_pod_does_not_begin_is_told_in_the_kubelets_words(cluster: KubeCluster) -> None:
    """It is asked for when the pod is old enough, and only of that pod."""
    await cluster.apply(app("begins"))
    await run(cluster, "begins")
    raw = await cluster.get("DistributedApp", "default", "begins")
    assert raw is not None
    labels = {"drumline.dev/app": "begins", "drumline.dev/revision": raw["status"]["updateRevision"]}
    meta = {"name": "begins-0", "namespace": "default", "labels": labels}
    spec = {"nodeName": "n1", "containers": [{"name": "worker", "image": "a:1"}]}
    pod = await cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    words = 'MountVolume.SetUp failed for volume "credentials" : secret "git" not found'
    for name, uid, type, message in (
        ("begins-0.1", pod["metadata"]["uid"], "Warning", words),
        ("begins-0.2", "another", "Warning", "of another pod"),
        ("begins-0.3", pod["metadata"]["uid"], "Normal", "not a warning"),
    ):
        subject = {"kind": "Pod", "name": "begins-0", "namespace": "default", "uid": uid}
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": "default"}}
        await cluster.create(
            {**event, "involvedObject": subject, "type": type, "reason": "FailedMount", "message": message}
        )
    outcome = await run(cluster, "begins")
    assert outcome.again == SETTINGS.progress_interval
    assert ready(await cluster.get("DistributedApp", "default", "begins"))["reason"] == "Starting"
    later = datetime.now(UTC) + timedelta(seconds=SETTINGS.progress_interval + 1)
    await reconcile("default/begins", cluster, lambda: later, SETTINGS)
    found = ready(await cluster.get("DistributedApp", "default", "begins"))
    assert found["reason"] == "MountFailed"
    assert found["message"].startswith(f"begins-0: {words}; ")
    await cluster.delete("Pod", "default", "begins-0", pod["metadata"]["uid"])


async def test_a_spec_that_no_server_takes_is_told_beside_a_child_that_runs(cluster: KubeCluster) -> None:
    """What the spec is to blame for is still the spec's fault when its child exists; the child stays as it is."""
    await cluster.apply(app("worse"))
    await run(cluster, "worse")
    before = await cluster.get("Deployment", "default", "worse")
    await cluster.apply(app("worse", podTemplate={"spec": {"priority": "high"}}))
    with pytest.raises(Refused):
        await run(cluster, "worse")
    assert ready(await cluster.get("DistributedApp", "default", "worse"))["reason"] == "RefusedByServer"
    assert await cluster.get("Deployment", "default", "worse") == before


async def test_a_child_of_somebody_else_is_not_taken_over(cluster: KubeCluster) -> None:
    await cluster.apply(app("ours"))
    await run(cluster, "ours")
    ours = await cluster.get("Service", "default", "ours")
    assert ours is not None
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "else", "uid": "0", "controller": True}
    theirs = {"name": "theirs", "namespace": "default", "ownerReferences": [owner]}
    port = {"name": "http", "port": 9}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": theirs, "spec": {"ports": [port]}}
    before = await cluster.create(service)
    same = {key: ours[key] for key in ("apiVersion", "kind")}
    meta = {"name": "theirs", "namespace": "default", "ownerReferences": ours["metadata"]["ownerReferences"]}
    with pytest.raises(Refused):
        await cluster.apply({**same, "metadata": meta, "spec": {"ports": [{"name": "http", "port": 8080}]}})
    assert await cluster.get("Service", "default", "theirs") == before


async def test_a_name_that_is_taken_is_left_alone(cluster: KubeCluster) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken", "namespace": "default"}}
    await cluster.apply({**service, "spec": {"ports": [{"port": 1}]}})
    await cluster.apply(app("taken"))
    await run(cluster, "taken")
    assert ready(await cluster.get("DistributedApp", "default", "taken"))["reason"] == "NameTaken"
    assert [kind for kind in API_VERSIONS if await cluster.get(kind, "default", "taken")] == ["Service"]


async def test_only_the_object_that_was_meant(cluster: KubeCluster) -> None:
    await cluster.apply(app("meant"))
    raw = await cluster.get("DistributedApp", "default", "meant")
    assert raw is not None
    other = {**raw, "metadata": {**raw["metadata"], "uid": "00000000-0000-0000-0000-000000000000"}}
    await run(cluster, "meant")
    with pytest.raises(Conflict):
        await cluster.set_status(raw, {"summary": "0/1"})  # it has changed since
    with pytest.raises(Conflict):
        await cluster.delete("DistributedApp", "default", "meant", other["metadata"]["uid"])
    await cluster.delete("DistributedApp", "default", "meant", raw["metadata"]["uid"])
    await cluster.delete("DistributedApp", "default", "meant", raw["metadata"]["uid"])
    assert (await run(cluster, "meant")).gone


async def test_a_server_that_is_not_there() -> None:
    async with KubeCluster(Configuration(host="http://127.0.0.1:9")) as nowhere:
        with pytest.raises(Unavailable):
            await nowhere.get("Pod", "default", "x")
        assert await nowhere.runner_status({"status": {"podIP": "127.0.0.1"}}, 9) is None
    assert issubclass(Unavailable, ClusterError)
