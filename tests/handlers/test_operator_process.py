"""The operator as a process against a real API server: it makes, repairs, stays quiet, and takes over."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster.envtest import EnvTest
from tests.handlers.harness import Start, until

from drumline_operator.cluster import Expired
from drumline_operator.kube import RESOURCES, KubeCluster
from drumline_operator.manifests.names import API_VERSIONS

WRITES = "drumline_operator_api_writes_total"


def app(namespace: str, name: str = "sdxl", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"workerClass": "app:Worker", "image": "a:1", "numGPUs": 0, **spec},
    }


def reason(raw: Any) -> str:
    conditions = ((raw or {}).get("status") or {}).get("conditions") or ()
    return next((each["reason"] for each in conditions if each["type"] == "Ready"), "")


async def made(cluster: KubeCluster, namespace: str, name: str = "sdxl") -> dict[str, Any]:
    """Return the app once its Deployment is there and its status says so."""
    await until(cluster, "Deployment", namespace, name, bool)
    found: dict[str, Any] = await until(
        cluster, "DistributedApp", namespace, name, lambda raw: reason(raw) == "Starting"
    )
    return found


async def patch(cluster: KubeCluster, kind: str, namespace: str, name: str, body: dict[str, Any]) -> None:
    path = RESOURCES[kind].path(namespace, name)
    await cluster._call("PATCH", path, body=body, content_type="application/merge-patch+json")


async def test_an_app_is_made_and_changed(start: Start, cluster: KubeCluster, namespace: str) -> None:
    operator = await start(WATCH_NAMESPACES=namespace)
    await cluster.apply(app(namespace))
    raw = await made(cluster, namespace)
    assert "finalizers" not in raw["metadata"]
    assert "annotations" not in raw["metadata"]
    for kind in ("Service", "PodDisruptionBudget"):
        assert await cluster.get(kind, namespace, "sdxl")
    await cluster.apply(app(namespace, replicas=3, networkPolicy="DenyAllIngress"))
    await until(cluster, "Deployment", namespace, "sdxl", lambda live: live["spec"]["replicas"] == 3)
    await until(cluster, "NetworkPolicy", namespace, "sdxl", bool)
    await cluster.apply(app(namespace, replicas=3))
    await until(cluster, "NetworkPolicy", namespace, "sdxl", lambda live: live is None)
    assert await operator.probe("/healthz") == await operator.probe("/readyz") == 200
    assert await operator.stop() == 0


async def test_drift_is_repaired(start: Start, cluster: KubeCluster, namespace: str) -> None:
    await start(WATCH_NAMESPACES=namespace)
    await cluster.apply(app(namespace))
    await made(cluster, namespace)
    await patch(cluster, "Deployment", namespace, "sdxl", {"spec": {"replicas": 7}})
    await until(cluster, "Deployment", namespace, "sdxl", lambda live: live["spec"]["replicas"] == 1)
    await patch(cluster, "Service", namespace, "sdxl", {"metadata": {"labels": {"drumline.dev/app": None}}})
    await until(cluster, "Service", namespace, "sdxl", lambda live: "drumline.dev/app" in live["metadata"]["labels"])
    for kind in ("Service", "PodDisruptionBudget", "Deployment"):
        live = await cluster.get(kind, namespace, "sdxl")
        assert live is not None
        before = live["metadata"]["uid"]
        await cluster.delete(kind, namespace, "sdxl", before)
        await until(
            cluster, kind, namespace, "sdxl", lambda live, before=before: live and live["metadata"]["uid"] != before
        )


async def test_a_restart_writes_nothing(start: Start, cluster: KubeCluster, namespace: str) -> None:
    first = await start(WATCH_NAMESPACES=namespace)
    names = [f"app-{number}" for number in range(10)]
    for name in names:
        await cluster.apply(app(namespace, name))
    for name in names:
        await made(cluster, namespace, name)
    await first.stop()
    before = {name: await cluster.get("DistributedApp", namespace, name) for name in names}
    second = await start(WATCH_NAMESPACES=namespace, RESYNC=0.5)
    await second.runs(3 * len(names))
    assert await second.metric(WRITES) == 0
    assert before == {name: await cluster.get("DistributedApp", namespace, name) for name in names}


async def test_a_name_that_is_taken(start: Start, cluster: KubeCluster, namespace: str) -> None:
    """It belongs to an object without our label, which is not watched."""
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "sdxl", "namespace": namespace}}
    await cluster.apply({**service, "spec": {"ports": [{"port": 1}]}})
    operator = await start(WATCH_NAMESPACES=namespace, PROGRESS_INTERVAL=0.2)
    await cluster.apply(app(namespace))
    await until(cluster, "DistributedApp", namespace, "sdxl", lambda raw: reason(raw) == "NameTaken")
    await operator.runs(3)
    live = await cluster.get("Service", namespace, "sdxl")
    assert live is not None
    assert live["spec"]["ports"][0]["port"] == 1
    assert [kind for kind in API_VERSIONS if await cluster.get(kind, namespace, "sdxl")] == ["Service"]
    await cluster.delete("Service", namespace, "sdxl", live["metadata"]["uid"])
    await made(cluster, namespace)


async def test_a_leader_that_is_killed_is_followed(start: Start, cluster: KubeCluster, namespace: str) -> None:
    # A busy machine must not keep the first from its renewal, or it would not be killed as a leader.
    times = {"LEASE_DURATION": 8, "RENEW_DEADLINE": 7, "RETRY_PERIOD": 0.5}
    common = {"WATCH_NAMESPACES": namespace, "NAMESPACE": namespace, "LEADER_ELECTION": True, **times}
    one = await start(**common, IDENTITY="one")
    await one.says("one leads")
    two = await start(**common, IDENTITY="two")
    await two.says("all is seen")
    assert [await each.metric("drumline_operator_leader") for each in (one, two)] == [1, 0]
    assert [await each.probe("/readyz") for each in (one, two)] == [200, 200]
    await cluster.apply(app(namespace, "first"))
    await made(cluster, namespace, "first")
    await one.stop(signal.SIGKILL)
    await cluster.apply(app(namespace, "second"))
    await made(cluster, namespace, "second")
    assert await two.metric("drumline_operator_leader") == 1
    # It would wait for an hour, unless the Lease is given back.
    three = await start(**{**common, "LEASE_DURATION": 3600}, IDENTITY="three")
    await three.says("all is seen")
    assert await two.stop() == 0
    await three.says("three leads")
    lease = await cluster.get("Lease", namespace, "drumline-operator")
    assert lease is not None
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("three", 2)


async def test_a_config_map_is_watched(start: Start, cluster: KubeCluster, namespace: str) -> None:
    await start(WATCH_NAMESPACES=namespace)
    await cluster.apply(app(namespace, source={"configMap": {"name": "code"}}))
    await until(cluster, "DistributedApp", namespace, "sdxl", lambda raw: reason(raw) == "ConfigMapNotFound")
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "code", "namespace": namespace}}
    await cluster.create({**code, "data": {"app.py": "one"}})
    first = await made(cluster, namespace)
    await patch(cluster, "ConfigMap", namespace, "code", {"data": {"app.py": "two"}})
    revision = first["status"]["updateRevision"]
    await until(cluster, "DistributedApp", namespace, "sdxl", lambda raw: raw["status"]["updateRevision"] != revision)


async def test_machine_types_and_nodes(start: Start, cluster: KubeCluster, namespace: str) -> None:
    name = f"h100-{namespace}"
    await start(WATCH_NAMESPACES=namespace)
    await cluster.apply(app(namespace, machineType=name, numGPUs=2))
    await until(cluster, "DistributedApp", namespace, "sdxl", lambda raw: reason(raw) == "NoMatchingMachineType")
    machine = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "MachineType",
        "metadata": {"name": name},
        "spec": {"gpusPerNode": 8, "nodeSelector": {"machine": name}},
    }
    await cluster.apply(machine)
    await made(cluster, namespace)
    await until(cluster, "MachineType", None, name, lambda raw: (raw.get("status") or {}).get("nodes") == 0)
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"machine": name}}}
    await cluster.create(node)
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"nvidia.com/gpu": "8"}}
    path = RESOURCES["Node"].path(None, name, "status")
    await cluster._call("PATCH", path, body={"status": ready}, content_type="application/merge-patch+json")
    await until(cluster, "MachineType", None, name, lambda raw: raw["status"].get("allocatableGPUs") == 8)


async def test_an_api_server_that_restarts(server: EnvTest, start: Start, cluster: KubeCluster, namespace: str) -> None:
    operator = await start(WATCH_NAMESPACES=namespace)
    await cluster.apply(app(namespace))
    await made(cluster, namespace)
    await asyncio.to_thread(server.kill, "kube-apiserver")
    await operator.says("the watch broke")
    assert await operator.probe("/healthz") == 200
    server.revive("kube-apiserver")  # not in a thread: it would end with the one that started it
    await cluster.apply(app(namespace, replicas=2))
    await until(cluster, "Deployment", namespace, "sdxl", lambda live: live["spec"]["replicas"] == 2)
    await patch(cluster, "Deployment", namespace, "sdxl", {"spec": {"replicas": 7}})
    await until(cluster, "Deployment", namespace, "sdxl", lambda live: live["spec"]["replicas"] == 2)
    # What was before the restart is not known to its watches any more.
    with pytest.raises(Expired):
        async for _ in cluster.watch("Service", None, "", "1"):
            pass
    assert await operator.stop() == 0


async def test_no_api_server(server: EnvTest, start: Start, tmp_path: Path) -> None:
    """It lives, says that it has seen nothing yet, and ends when it is asked to."""
    nowhere = tmp_path / "kubeconfig"
    nowhere.write_text(server.kubeconfig.read_text().replace(server.url, "https://127.0.0.1:9"))
    operator = await start(kubeconfig=nowhere)
    await operator.says("cannot be listed")
    assert [await operator.probe(path) for path in ("/healthz", "/readyz")] == [200, 503]
    assert await operator.stop() == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("WORKERS", "none", "DRUMLINE_OPERATOR_WORKERS"), ("BIND", "192.0.2.1:1", "cannot listen on 192.0.2.1:1")],
)
async def test_a_wrong_setting_ends_it(server: EnvTest, name: str, text: str, words: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "drumline_operator"),
        env={**server.environment(), f"DRUMLINE_OPERATOR_{name}": text},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert words in said.decode()
    assert len(said.splitlines()) == 1
