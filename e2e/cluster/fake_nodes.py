"""Nodes that only exist in the API, for figures at a scale that no machine has: kwok plays their kubelets.

Their pods run nothing; they are Ready at once and gone at once. A taint keeps all others away, as on a pool of GPU nodes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import nodes
from .components import FAKE_MARK as MARK
from .components import FAKE_VALUE as VALUE
from .components import STAGES
from .layout import GPU_RESOURCE
from .local import LocalCluster

#: Annotation of a pod on them: the address that it gets, where a test has something that answers for it.
POD_ADDRESS = "drumline.dev/e2e-pod-address"
#: For pods that may run on them.
TOLERATION = {"key": MARK, "operator": "Equal", "value": VALUE, "effect": "NoSchedule"}
_CONNECTIONS = 8
_RESOURCES = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "10Ti", "pods": "110"}


def name(index: int) -> str:
    """Of the node with that number, from 1 on."""
    return f"fake-{index:05}"


def node(index: int, gpus: int, labels: Mapping[str, str]) -> dict[str, Any]:
    """A fake node.

    Args:
        index: From 1 on.
        gpus: How many it pretends to have.
        labels: Further labels.
    """
    resources = _RESOURCES | {GPU_RESOURCE: str(gpus)}
    own = {
        MARK: VALUE,
        "kubernetes.io/hostname": name(index),
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name(index), "labels": own | dict(labels), "annotations": {MARK: VALUE}},
        "spec": {"taints": [{"key": MARK, "value": VALUE, "effect": "NoSchedule"}]},
        "status": {"allocatable": resources, "capacity": resources},
    }


def changes(present: set[str], count: int) -> tuple[list[int], list[str]]:
    """What makes exactly `count` fake nodes of those present: numbers to create, names to delete."""
    wanted = {name(index): index for index in range(1, count + 1)}
    create = [index for node_name, index in wanted.items() if node_name not in present]
    return create, sorted(present - set(wanted))


def request_all(cluster: LocalCluster, calls: Sequence[tuple[str, str, object]]) -> None:
    """Make calls one after the other, on a connection of their own."""
    with cluster.api() as api:
        for method, path, body in calls:
            api.request(method, path, body)


def have(
    cluster: LocalCluster, count: int, gpus: int = 8, labels: Mapping[str, str] | None = None, limit: float = 300.0
) -> None:
    """Have exactly so many fake nodes, all of them Ready.

    Args:
        cluster: Which must run.
        count: How many; none with 0, and then kwok stays for the next ones.
        gpus: What each new one pretends to have.
        labels: Further labels of each new one.
        limit: Seconds until they are Ready.
    """
    cluster.store.ensure(["kwok"])
    control = cluster.nodes[0]
    shutil.copyfile(STAGES, control.directory / "etc" / STAGES.name)
    cluster.start(control.name, "kwok")
    selector = f"{MARK}%3D{VALUE}"
    with cluster.api() as api:
        present = {item["metadata"]["name"] for item in api.get(f"/api/v1/nodes?labelSelector={selector}")["items"]}
        create, delete = changes(present, count)
        calls: list[tuple[str, str, object]] = [
            ("POST", "/api/v1/nodes", node(index, gpus, labels or {})) for index in create
        ]
        calls += [("DELETE", f"/api/v1/nodes/{gone}", None) for gone in delete]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda first: request_all(cluster, calls[first::_CONNECTIONS]), range(_CONNECTIONS)))
        ready: set[str] = set()

        def done(node_name: str, item: Mapping[str, Any] | None) -> bool:
            (ready.add if item and nodes.is_ready(item) else ready.discard)(node_name)
            return len(ready) == count

        if count:
            nodes.wait(api, done, limit=limit, check=cluster.check, selector=selector)
