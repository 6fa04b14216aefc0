"""Names, addresses and directories of one cluster. Nothing here touches the machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parents[1]

CLUSTER_DOMAIN = "cluster.local"
GPU_RESOURCE = "nvidia.com/gpu"
#: Tells a node that runs containers from one that is only an object in the API.
NODE_LABEL = "drumline.dev/e2e-node"
#: The second number of a cluster's addresses 10.N.0.0/16; the first that is free on the machine is taken.
NETWORKS = range(96, 128)
API_PORT = 6443


@dataclass(frozen=True)
class Network:
    """The addresses of one cluster, all in 10.<index>.0.0/16, and what bears its number on the machine."""

    index: int

    @property
    def whole(self) -> str:
        """Everything that is routed into the cluster."""
        return f"10.{self.index}.0.0/16"

    @property
    def host_address(self) -> str:
        """The machine, as pods and nodes reach it."""
        return f"10.{self.index}.0.1"

    @property
    def pods(self) -> str:
        """All pods; each node has a /24 of it."""
        return f"10.{self.index}.64.0/18"

    @property
    def services(self) -> str:
        """All ClusterIPs."""
        return f"10.{self.index}.128.0/17"

    @property
    def api_service(self) -> str:
        """The Service `kubernetes`: the first address of the range, as the API server chooses it."""
        return f"10.{self.index}.128.1"

    @property
    def dns(self) -> str:
        """The Service of the cluster's DNS."""
        return f"10.{self.index}.128.10"

    @property
    def host_link(self) -> str:
        """The machine's network interface into the cluster (at most 15 characters)."""
        return f"drumline{self.index}"

    @property
    def cgroup(self) -> str:
        """The cgroup of all pods; made exclusively, so it also reserves this network."""
        return f"drumline-{self.index}"


@dataclass(frozen=True)
class Node:
    """One node: a set of namespaces with its own container runtime and kubelet."""

    index: int
    network: Network
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The host name and the name of the Node object."""
        return f"node-{self.index}"

    @property
    def address(self) -> str:
        """The node's own address."""
        return f"10.{self.network.index}.0.{10 + self.index}"

    @property
    def pod_network(self) -> str:
        """Where this node's pods get their addresses."""
        return f"10.{self.network.index}.{64 + self.index}.0/24"

    @property
    def is_control_plane(self) -> bool:
        """Whether etcd, the API server, the controller manager and the scheduler run here too."""
        return self.index == 1


@dataclass(frozen=True)
class Shape:
    """What `up` was asked for; kept in the run state, so that later commands mean the same cluster.

    Attributes:
        nodes: How many nodes.
        gpus: GPUs that each node advertises.
        proxy_mode: `nftables` or `iptables`.
        labels: Further labels by node name; they count when a node registers for the first time.
        network: The `Network.index`; -1 until one is reserved.
    """

    nodes: int = 2
    gpus: int = 8
    proxy_mode: str = "nftables"
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    network: int = -1

    def members(self) -> list[Node]:
        """The nodes, the control plane first."""
        network = Network(self.network)
        return [Node(i, network, self.labels.get(f"node-{i}", {})) for i in range(1, self.nodes + 1)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**values)


@dataclass(frozen=True)
class Layout:
    """Where the run state is; `up` makes everything under `state`, `down` removes it."""

    state: Path

    @classmethod
    def default(cls) -> Self:
        """`$E2E_CLUSTER_DIR`, or `.cluster` in the checkout."""
        return cls(Path(os.environ.get("E2E_CLUSTER_DIR") or CHECKOUT / ".cluster").resolve())

    @property
    def kubeconfig(self) -> Path:
        """The administrator's; other commands (kubectl, helm, tests) are given this file."""
        return self.state / "kubeconfig"

    @property
    def run(self) -> Path:
        """Process records, configuration, logs, certificates."""
        return self.state / "run"

    @property
    def shape(self) -> Path:
        """The `Shape` of the cluster that runs."""
        return self.run / "shape.json"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.run / "pki"

    @property
    def containerd(self) -> Path:
        """Images and container file systems, a directory per node."""
        return self.state / "containerd"

    def node(self, name: str) -> Path:
        """What belongs to one node."""
        return self.run / name

    def log(self, node: str, component: str) -> Path:
        """What a component prints."""
        return self.run / node / "log" / f"{component}.log"
