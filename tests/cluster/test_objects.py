"""Our manifests, the components' configuration, and the kind config."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import yaml
from e2e.cluster import components, configs, kind, objects, pins
from e2e.cluster.errors import ClusterError
from e2e.cluster.layout import GPU_RESOURCE, NODE_LABEL, Network, Node

NETWORK = Network(99)
NODE = Node(2, NETWORK, {"drumline.dev/gpu-product": "H100"})


def test_the_device_plugin_runs_where_pods_do_and_nowhere_else() -> None:
    (plugin,) = objects.gpu_plugin(8)
    pod = plugin["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {NODE_LABEL: "true"}
    assert pod["containers"][0]["image"] == pins.image_reference("fakegpu")
    assert pod["containers"][0]["args"] == ["-count=8"]
    assert GPU_RESOURCE in (pins.TOOLS_DIRECTORY / "images" / "fakegpu" / "main.go").read_text()


def test_dns_has_the_address_that_pods_are_given() -> None:
    service = next(item for item in objects.dns(NETWORK) if item["kind"] == "Service")
    files = configs.files(NODE, pause="p", plugins=[], proxy_mode="nftables", open_files=1024)
    assert json.loads(files["kubelet.json"])["clusterDNS"] == [service["spec"]["clusterIP"]] == [NETWORK.dns]


def test_a_name_without_a_value_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"manifests/fakegpu\.yaml: no value for \$\{"):
        objects.render("fakegpu", {})


@pytest.mark.parametrize("item", [*objects.dns(NETWORK), *objects.gpu_plugin(1)], ids=lambda item: item["kind"])
def test_every_object_has_a_place_in_the_api(item: dict[str, object]) -> None:
    assert str(objects.api_path(item)).endswith(item["metadata"]["name"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("version", "kind_", "path"),
    [
        ("v1", "Service", "/api/v1/namespaces/n/services/x"),
        ("v1", "Namespace", "/api/v1/namespaces/x"),
        ("apps/v1", "DaemonSet", "/apis/apps/v1/namespaces/n/daemonsets/x"),
        ("rbac.authorization.k8s.io/v1", "ClusterRole", "/apis/rbac.authorization.k8s.io/v1/clusterroles/x"),
    ],
)
def test_paths(version: str, kind_: str, path: str) -> None:
    assert objects.api_path({"apiVersion": version, "kind": kind_, "metadata": {"name": "x", "namespace": "n"}}) == path


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ClusterError, match="Gizmo is not in RESOURCES"):
        objects.api_path({"apiVersion": "v1", "kind": "Gizmo", "metadata": {"name": "x"}})


def test_only_the_control_plane_runs_the_control_plane() -> None:
    assert components.start_order(NODE) == ["containerd", "kubelet", "kube-proxy"]
    assert components.start_order(Node(1, NETWORK)) == [
        *("etcd", "containerd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
        *("kubelet", "kube-proxy"),
    ]


@pytest.mark.parametrize("component", components.start_order(Node(1, NETWORK)))
def test_every_component_is_a_program_that_is_built(component: str) -> None:
    assert components.arguments(component, NODE)[0] in pins.OWNERS


def test_labels_reach_the_kubelet() -> None:
    flags = components.arguments("kubelet", NODE)
    assert f"--node-labels={NODE_LABEL}=true,drumline.dev/gpu-product=H100" in flags


def test_configuration_files_say_what_they_must() -> None:
    plugins = [Path("/a b/'c'"), Path("/d")]
    files = configs.files(NODE, pause="localhost/pause:1", plugins=plugins, proxy_mode="iptables", open_files=20000)
    runtime = tomllib.loads(files["containerd.toml"])["plugins"]
    assert runtime["io.containerd.cri.v1.runtime"]["cni"]["bin_dirs"] == [str(path) for path in plugins]
    assert runtime["io.containerd.cri.v1.images"]["pinned_images"]["sandbox"] == "localhost/pause:1"
    kubelet = json.loads(files["kubelet.json"])
    assert kubelet["cgroupRoot"] == "/drumline-99/node-2"
    assert kubelet["maxOpenFiles"] == 20000
    assert json.loads(files["kube-proxy.json"])["mode"] == "iptables"
    assert json.loads(files["cni.conflist"])["plugins"][0]["ipam"]["ranges"] == [[{"subnet": NODE.pod_network}]]


def test_every_configuration_file_is_used() -> None:
    files = configs.files(NODE, pause="p", plugins=[], proxy_mode="nftables", open_files=1)
    flags = " ".join(
        word for name in components.start_order(Node(1, NETWORK)) for word in components.arguments(name, NODE)
    )
    assert {name for name in files if f"{components.CONFIG}/{name}" not in flags} == {"cni.conflist"}


def test_kind_has_two_nodes_for_the_device_plugin() -> None:
    nodes = yaml.safe_load(kind.CONFIG.read_text())["nodes"]
    assert [node["role"] for node in nodes if node.get("labels", {}).get(NODE_LABEL) == "true"] == ["worker", "worker"]
