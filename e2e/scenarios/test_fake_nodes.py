"""Nodes that only exist in the API, for figures at scale."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from e2e.cluster import fake_nodes
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.harness.kube import Kube, Objects, condition
from e2e.probe import GPU, Kubectl, application

NODES = 20
PODS = 40


@pytest.fixture
def fakes(cluster: Cluster) -> Iterator[LocalCluster]:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("only a cluster of our own has fake nodes")
    fake_nodes.have(cluster, NODES, gpus=2, labels={"drumline.dev/gpu-product": "H100"})
    yield cluster
    fake_nodes.have(cluster, 0)


def test_pods_that_tolerate_them_fill_them_and_go(fakes: LocalCluster, kubectl: Kubectl, namespace: str) -> None:
    items = json.loads(application(namespace, "none/such:1", replicas=PODS, gpus=1))
    template = items["items"][0]["spec"]["template"]["spec"]
    template |= {"tolerations": [fake_nodes.TOLERATION], "nodeSelector": {"drumline.dev/gpu-product": "H100"}}
    del template["topologySpreadConstraints"]
    kubectl("apply", "--filename=-", input=json.dumps(items))
    place = f"--namespace={namespace}"
    kubectl("rollout", "status", "deployment/probe", place, "--timeout=180s")
    names = kubectl("get", "pods", place, "--output=jsonpath={.items[*].spec.nodeName}").split()
    assert sorted(names) == sorted([*map(fake_nodes.name, range(1, NODES + 1))] * 2)  # two GPUs, two pods each
    kubectl("delete", "deployment/probe", place, "--wait=false")
    kubectl("wait", "--for=delete", "pod", "--selector=app=probe", place, "--timeout=180s")
    assert fakes.status()


def test_their_number_can_change_and_real_nodes_stay(fakes: LocalCluster, kubectl: Kubectl) -> None:
    fake_nodes.have(fakes, 3)
    listed = kubectl("get", "nodes", "--output=jsonpath={range .items[*]}{.metadata.name} {end}").split()
    assert listed == ["fake-00001", "fake-00002", "fake-00003", "node-1", "node-2"]
    plugins = kubectl(
        "get", "pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=fakegpu", "--output=name"
    )
    assert len(plugins.split()) == 2  # no other pod of ours lands on a fake node


def test_pods_that_do_not_tolerate_them_stay_away(fakes: LocalCluster, namespace: str) -> None:
    items = json.loads(application(namespace, "none/such:1", replicas=1, gpus=1))
    items["items"][0]["spec"]["template"]["spec"]["nodeSelector"] = {"drumline.dev/gpu-product": "H100"}
    kube = Kube(fakes, namespace)
    kube("apply", "--filename=-", input=json.dumps(items))

    def refused(pods: Objects) -> bool:
        """It may be looked at first before the scheduler has heard of the nodes."""
        return any("untolerated taint" in condition(pod, "PodScheduled").get("message", "") for pod in pods.values())

    (pod,) = kube.until_all("pod", refused, "the taint keeps it away", selector="app=probe").values()
    said = condition(pod, "PodScheduled")
    assert said["status"] == "False"
    assert GPU not in said["message"]
