"""Streams go on while parts of the control plane are away, and what was asked for meanwhile is done afterwards."""

from __future__ import annotations

import time

import pytest
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client, Stream
from e2e.harness.kube import Kube, has
from e2e.harness.operator import Operator

HOLD = {"hold": True}


@pytest.fixture
def local(cluster: Cluster) -> LocalCluster:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("only of a cluster of our own may parts be killed")
    return cluster


def assert_went_on(stream: Stream, began: float, ended: float) -> None:
    """There were updates all the time between two moments, in order."""
    times = [each.data["time"] for each in stream.events if began < each.data.get("time", 0) < ended]
    steps = [each.data["step"] for each in stream.events if "step" in each.data]
    assert steps == list(range(1, len(steps) + 1))
    assert times, "no update came meanwhile"


def test_without_the_operator_leader(kube: Kube, client: Client, operator: Operator) -> None:
    app = App(kube, apps.app("leader"))
    app.ready()
    before = app.pod()["metadata"]["uid"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    lost = operator.kill_leader()
    app.change(replicas=2)
    app.ready()

    assert operator.leader() != lost
    first, second = app.pods()
    assert first["metadata"]["uid"] == before
    for pod in (first, second):
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    stream.take(3)
    app.release(first["metadata"]["name"])
    assert stream.result()["pod"] == first["metadata"]["name"]


def test_without_the_api_server(kube: Kube, client: Client, operator: Operator, local: LocalCluster) -> None:
    app = App(kube, apps.app("api"))
    app.ready()
    before = app.pod()["metadata"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    began = time.time()
    local.stop("node-1", "kube-apiserver")
    stream.source.drop()  # our own connection to the client goes through the API server; the stream does not
    local.up()
    ended = time.time()
    stream.source.attach()
    app.release(before["name"])
    assert stream.result()["pod"] == before["name"]
    assert_went_on(stream, began, ended)

    assert app.pod()["metadata"]["uid"] == before["uid"]
    app.set_env(WORD="afterwards")
    app.replaced()
    assert client.call(app.url, {}).body["word"] == "afterwards"


def test_without_a_kubelet(kube: Kube, client: Client, operator: Operator, local: LocalCluster) -> None:
    elsewhere = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [client.node]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [elsewhere]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    # However long the kubelet takes to come back: what happens to pods of a node that stays away is not asked here.
    stays = [{"key": f"node.kubernetes.io/{key}", "operator": "Exists"} for key in ("not-ready", "unreachable")]
    app = App(kube, apps.app("kubelet", podTemplate={"spec": {"affinity": affinity, "tolerations": stays}}))
    app.ready()
    before = app.pod()
    node = before["spec"]["nodeName"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    began = time.time()
    local.stop(node, "kubelet")
    try:
        kube.until("node", node, has("Ready", "Unknown"), "the node is missed")
        app.says("Available", "False", "MinimumReplicasUnavailable")
        ended = time.time()
        stream.take(1)
    finally:
        local.up()
    app.ready()
    app.release(before["metadata"]["name"])
    assert stream.result()["pod"] == before["metadata"]["name"]
    assert_went_on(stream, began, ended)
    assert app.pod()["metadata"]["uid"] == before["metadata"]["uid"]
    assert app.pod()["status"]["containerStatuses"][0]["restartCount"] == 0
