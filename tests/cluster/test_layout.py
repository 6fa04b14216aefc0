"""Addresses, and the choice of a network that nobody uses."""

from __future__ import annotations

import ipaddress
import itertools
from pathlib import Path

import pytest
from e2e.cluster import network
from e2e.cluster.layout import CHECKOUT, NETWORKS, Layout, Network, Node, Shape


@pytest.mark.parametrize("index", [NETWORKS[0], NETWORKS[-1]])
def test_everything_lies_in_one_network_and_nothing_overlaps(index: int) -> None:
    net = Network(index)
    whole = ipaddress.ip_network(net.whole)
    pods, services = ipaddress.ip_network(net.pods), ipaddress.ip_network(net.services)
    nodes = [Node(i, net) for i in range(1, 10)]
    links = ipaddress.ip_network(f"{net.host_address}/24", strict=False)
    assert all(part.subnet_of(whole) for part in (pods, services, links))
    assert not any(a.overlaps(b) for a, b in itertools.combinations((pods, services, links), 2))
    assert all(ipaddress.ip_network(node.pod_network).subnet_of(pods) for node in nodes)
    assert len({node.pod_network for node in nodes}) == len(nodes)
    addresses = {node.address for node in nodes} | {net.host_address}
    assert len(addresses) == 10
    assert all(ipaddress.ip_address(address) in links for address in addresses)
    assert ipaddress.ip_address(net.api_service) == services[1]  # as the API server chooses it
    assert ipaddress.ip_address(net.dns) in services


def test_a_link_name_fits_the_kernel() -> None:
    assert all(len(Network(index).host_link) <= 15 for index in NETWORKS)


@pytest.mark.parametrize(
    ("routes", "first"),
    [
        ([], 96),
        (["default", "192.168.0.0/24", "0.0.0.0/0"], 96),
        (["10.96.3.0/24"], 97),
        (["10.96.128.7", "10.97.0.0/16"], 98),
        (["10.96.0.0/12"], 112),
        (["10.0.0.0/8"], None),
    ],
)
def test_a_network_in_use_is_not_taken(routes: list[str], first: int | None) -> None:
    found = network.free(routes)
    assert (found[0].index if found else None) == first


def test_a_shape_survives_json() -> None:
    shape = Shape(nodes=3, gpus=2, labels={"node-2": {"a": "b"}}, network=99)
    assert Shape.from_dict(shape.to_dict()) == shape
    assert [(node.name, dict(node.labels)) for node in shape.members()] == [
        ("node-1", {}),
        ("node-2", {"a": "b"}),
        ("node-3", {}),
    ]
    assert [node.is_control_plane for node in shape.members()] == [True, False, False]


def test_the_state_is_in_the_checkout_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("E2E_CLUSTER_DIR", raising=False)
    assert Layout.default().state == CHECKOUT / ".cluster"
    assert ".cluster/" in (CHECKOUT / ".gitignore").read_text().splitlines()
    monkeypatch.setenv("E2E_CLUSTER_DIR", str(tmp_path))
    assert Layout.default().state == tmp_path
