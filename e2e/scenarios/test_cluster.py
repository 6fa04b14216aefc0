"""What every other scenario takes for granted: pods on all nodes, GPUs, names, Services, failures of a node."""

from __future__ import annotations

import json
from typing import Any

import pytest
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.probe import GPU, Kubectl, application, ask, ask_until, pod_spec


@pytest.fixture
def pods(kubectl: Kubectl, namespace: str, probe_image: str) -> list[dict[str, Any]]:
    """Two ready pods with two GPUs each."""
    kubectl("apply", "--filename=-", input=application(namespace, probe_image, replicas=2, gpus=2))
    kubectl("rollout", "status", "deployment/probe", f"--namespace={namespace}", "--timeout=180s")
    found: list[dict[str, Any]] = json.loads(kubectl("get", "pods", f"--namespace={namespace}", "--output=json"))[
        "items"
    ]
    return found


def test_a_deployment_has_gpus_on_both_nodes(kubectl: Kubectl, pods: list[dict[str, Any]]) -> None:
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    for pod in pods:
        ids = ask(kubectl, pod, "/env?name=NVIDIA_VISIBLE_DEVICES")[0].split(",")
        assert len(set(ids)) == 2
        devices = {name for name in ask(kubectl, pod, "/files?of=/dev") if name.startswith("nvidia")}
        assert devices == {identifier.replace("GPU-", "nvidia") for identifier in ids}


def test_a_pod_finds_others_by_name(kubectl: Kubectl, namespace: str, pods: list[dict[str, Any]]) -> None:
    service = kubectl("get", "service/probe", f"--namespace={namespace}", "--output=jsonpath={.spec.clusterIP}")
    for name in ("probe", f"probe.{namespace}", f"probe.{namespace}.svc.cluster.local"):
        assert ask_until(kubectl, pods[0], f"/lookup?name={name}") == [service]
    with pytest.raises(Exception, match="no such host"):
        ask(kubectl, pods[0], "/lookup?name=nothing-of-that-name")


def test_a_service_reaches_the_pods_of_all_nodes(kubectl: Kubectl, pods: list[dict[str, Any]]) -> None:
    names = {pod["metadata"]["name"] for pod in pods}
    # Each node's rules follow readiness with a delay, and choose at random.
    for pod in pods:
        for name in names:
            ask_until(kubectl, pod, "/get?url=http://probe/", [name].__eq__)


def test_a_pod_that_asks_for_too_much_waits_and_says_why(kubectl: Kubectl, namespace: str, probe_image: str) -> None:
    item = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "large", "namespace": namespace},
        "spec": pod_spec(probe_image, 9),
    }
    kubectl("create", "--filename=-", input=json.dumps(item))
    pod = ("pod/large", f"--namespace={namespace}")
    reason = "{.status.conditions[?(@.type=='PodScheduled')].reason}"
    kubectl("wait", f"--for=jsonpath={reason}=Unschedulable", *pod, "--timeout=120s")
    message = kubectl("get", *pod, "--output=jsonpath={.status.conditions[?(@.type=='PodScheduled')].message}")
    assert f"Insufficient {GPU}" in message


def test_a_pod_outside_the_profile_is_refused(kubectl: Kubectl, namespace: str, probe_image: str) -> None:
    spec = pod_spec(probe_image, 0)
    del spec["securityContext"]["runAsNonRoot"]
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "loose", "namespace": namespace}, "spec": spec}
    with pytest.raises(Exception, match='violates PodSecurity "restricted:latest"'):
        kubectl("create", "--filename=-", input=json.dumps(item))


def test_a_kubelet_that_was_killed_comes_back_with_its_gpus(
    cluster: Cluster, kubectl: Kubectl, pods: list[dict[str, Any]]
) -> None:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("only a cluster of our own lets us kill a kubelet")
    cluster.stop("node-2", "kubelet")
    kubectl("wait", "--for=condition=Ready=Unknown", "node/node-2", "--timeout=120s")
    assert not cluster.status()
    cluster.up()
    kubectl("wait", "--for=jsonpath={.status.allocatable.nvidia\\.com/gpu}=8", "node/node-2", "--timeout=120s")
    for pod in pods:
        assert ask(kubectl, pod, "/") == [pod["metadata"]["name"]]
