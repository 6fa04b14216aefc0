"""GPUs that are taken, machines that do not exist, and what people are told about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import Kube, Object, has
from e2e.probe import GPU, application

#: GPUs in a cluster without GPUs: ranks run on the CPU.
ON_CPU = {"DRUMLINE_DEVICE": "cpu"}
OURS = "drumline.dev/e2e-node=true"
Manifest = dict[str, Any]


def gpus_of_nodes(kube: Kube) -> list[int]:
    """Those of our nodes; one whose kubelet has just begun anew has none until its plugin is there again."""

    def of(node: Object) -> int:
        return int(node["status"]["allocatable"].get(GPU, 0))

    nodes = kube.until_all("node", lambda nodes: all(map(of, nodes.values())), "they have GPUs", selector=OURS)
    return [of(node) for node in nodes.values()]


def gpu_app(name: str, **spec: Any) -> Manifest:
    return apps.app(name, env=ON_CPU, **{"numGPUs": 2, "worldSize": None, **spec})


def test_gpus_that_are_all_taken_and_then_free(kube: Kube, client: Client, probe_image: str) -> None:
    """Two nodes with two free GPUs each, two apps that want two GPUs for each replica."""
    gpus = gpus_of_nodes(kube)
    if len(gpus) != 2 or len(set(gpus)) != 1:
        pytest.skip("needs two nodes with as many GPUs each")
    kube("apply", "--filename=-", input=application(kube.namespace, probe_image, replicas=2, gpus=gpus[0] - 2))
    kube("rollout", "status", "deployment/probe", "--timeout=180s")
    first = App(kube, gpu_app("first", replicas=2))
    first.ready()
    assert len({pod["spec"]["nodeName"] for pod in first.pods()}) == 2
    answer = client.call(first.url, {}).body
    assert answer["ranks"] == 2

    second = App(kube, gpu_app("second"))
    said = second.says("Ready", "False", "InsufficientGPUs")
    assert f"Insufficient {GPU}" in said, "the scheduler's own words"
    # A control plane that takes no pods may be counted, too.
    assert re.search(r"0/[23] nodes are available", second.says("Scheduled", "False", "InsufficientGPUs"))
    second.reported("Warning InsufficientGPUs")
    kube("scale", "dapp/first", "--replicas=1")
    second.ready()
    first.ready()
    assert client.call(second.url, {}).status == 200


@pytest.fixture
def machine_type(kube: Kube) -> Iterator[Manifest]:
    """A MachineType whose label no node has yet."""
    name = f"h100-{kube.namespace}"
    spec = {
        "nodeSelector": {"drumline.dev/machine": name},
        "aliases": [f"GPU-{name}"],
        "sharedMemorySizePerGPU": "64Mi",
    }
    item = {"apiVersion": "drumline.dev/v1alpha1", "kind": "MachineType", "metadata": {"name": name}, "spec": spec}
    kube.apply(item)
    yield item
    kube("delete", "mt", name)
    kube("label", "node", "--all", "drumline.dev/machine-")


def test_a_machine_type_by_its_alias(kube: Kube, client: Client, machine_type: Manifest) -> None:
    name = machine_type["metadata"]["name"]
    alias = machine_type["spec"]["aliases"][0]
    app = App(kube, gpu_app("alias", machineType=alias))
    assert f"{name} has 0 nodes (label drumline.dev/machine={name})" in app.says(
        "Scheduled", "False", "NoMatchingMachineType"
    )
    kube.until("mt", name, has("Available", "False", "NoNodes"), "it says that it has no nodes")
    kube("label", "node", client.node, f"drumline.dev/machine={name}")
    app.ready()
    live = kube.until("mt", name, has("Available", "True", "NodesFound"), "its node is found")
    assert live["status"]["nodes"] == 1
    (pod,) = app.pods()
    assert pod["spec"]["nodeName"] == client.node
    sizes = [volume["emptyDir"].get("sizeLimit") for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
    assert sizes == ["128Mi"]
    row = kube("get", "dapp", "alias").splitlines()
    assert row[0].split() == ["NAME", "READY", "REASON", "REPLICAS", "GPUS", "MACHINE", "URL", "AGE"]
    assert row[1].split()[:6] == ["alias", "True", "Serving", "1/1", "2", alias]
    assert json.loads(kube("get", "dapp", "alias", "--output=json"))["status"]["groups"][0]["nodeName"] == client.node
