"""The network between the machine and the nodes: a bridge in a namespace of its own, and routes to it.

The machine reaches nodes, pods and Services by their addresses, and pods reach the machine. Nothing leads out.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import cgroups
from .errors import ClusterError
from .layout import NETWORKS, Network
from .process import command
from .sandbox import NodeSandbox, Sandbox

BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def free(routes: Iterable[str], candidates: Iterable[int] = NETWORKS) -> list[Network]:
    """The networks that overlap with none of the machine's routes.

    Args:
        routes: Destinations as `ip route` prints them: networks, addresses, `default`.
        candidates: Indices to choose from.
    """
    taken = [ipaddress.ip_network(route, strict=False) for route in routes if route != "default"]
    taken = [network for network in taken if network.version == 4 and network.prefixlen > 0]
    found = (Network(index) for index in candidates)
    return [network for network in found if not any(ipaddress.ip_network(network.whole).overlaps(t) for t in taken)]


def reserve() -> Network:
    """A network that nobody on this machine uses, together with its cgroup.

    Raises:
        ClusterError: There is none left.
    """
    routes = [route["dst"] for route in json.loads(command("ip", "-json", "-4", "route", "show", "table", "all"))]
    for network in free(routes):
        if cgroups.reserve(network.cgroup):
            return network
    first, last = Network(NETWORKS[0]).whole, Network(NETWORKS[-1]).whole
    raise ClusterError(
        f"none of {first} to {last} is free on this machine; remove another cluster (`make cluster-down`)"
    )


def node_script(node: NodeSandbox, nodes: Sequence[NodeSandbox]) -> list[str]:
    """Shell lines that configure the network of a node from inside."""
    return [
        "ip link set lo up",
        f"ip address add {node.node.address}/24 dev eth0",
        "ip link set eth0 up",
        # Nothing leads out: look-ups of anything else fail at once instead of after a time-out.
        "ip route add unreachable default",
        # A packet to a Service needs some route before kube-proxy's rules send it elsewhere.
        f"ip route add {node.node.network.services} dev eth0",
        *(f"ip route add {peer.node.pod_network} via {peer.node.address}" for peer in nodes if peer is not node),
        "echo 1 >/proc/sys/net/ipv4/ip_forward",
        f"echo 1 >{BRIDGE_FILTER}",
    ]


def connect(network: Network, fabric: Sandbox, nodes: Sequence[NodeSandbox]) -> None:
    """Join the machine and the nodes."""
    fabric.network("ip", "link", "add", "fabric", "type", "bridge")
    fabric.network("ip", "link", "set", "fabric", "up")
    link = network.host_link
    assert fabric.init
    command("ip", "link", "add", link, "type", "veth", "peer", "name", "host", "netns", str(fabric.init.pid))
    command("ip", "address", "add", f"{network.host_address}/24", "dev", link)
    command("ip", "link", "set", link, "up")
    fabric.network("ip", "link", "set", "host", "master", "fabric", "up")
    for box in nodes:
        assert box.init
        name, inside = box.name, str(box.init.pid)
        fabric.network("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", inside)
        fabric.network("ip", "link", "set", name, "master", "fabric", "up")
        box.command("sh", "-ec", "\n".join(node_script(box, nodes)))
        command("ip", "route", "add", box.node.pod_network, "via", box.node.address, "dev", link)
    command("ip", "route", "add", network.services, "via", nodes[0].node.address, "dev", link)


def disconnect(network: Network) -> None:
    """Remove the machine's end; its routes go with it."""
    link = Path(f"/sys/class/net/{network.host_link}")
    if not link.exists():
        return
    try:
        command("ip", "link", "delete", network.host_link)
    except ClusterError:
        if link.exists():  # else the kernel was quicker: it goes with the namespace of its other end
            raise
