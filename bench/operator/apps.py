"""The apps of the bench, and the same children as a plain client would make them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from e2e.cluster import components, fake_nodes

from drumline.api.v1alpha1 import API_VERSION
from drumline_operator.actions import Apply
from drumline_operator.observe import Observed
from drumline_operator.plan import plan

NAMESPACE = "drumline-bench"
FLOOR = "drumline-bench-floor"
GPUS_PER_NODE = 8
_MACHINE = "bench"
#: What nobody but this bench listens on, hopefully.
RUNNER_PORT = 18080


def machine_type() -> dict[str, Any]:
    """Return the MachineType of the fake nodes."""
    spec = {
        "gpusPerNode": GPUS_PER_NODE,
        "nodeSelector": {components.FAKE_MARK: components.FAKE_VALUE},
        "tolerations": [fake_nodes.TOLERATION],
    }
    return {"apiVersion": API_VERSION, "kind": "MachineType", "metadata": {"name": _MACHINE}, "spec": spec}


def fake_app(index: int, address: str, namespace: str = NAMESPACE) -> dict[str, Any]:
    """Return an app with one GPU whose pod only exists in the API.

    Args:
        index: its number.
        address: its pod's, where ``runners.serving`` answers.
        namespace: where it is.
    """
    spec = {
        "image": "none/such:1",
        "workerClass": "app:Worker",
        "numGPUs": 1,
        "machineType": _MACHINE,
        "serving": {"port": RUNNER_PORT},
        "podTemplate": {"metadata": {"annotations": {fake_nodes.POD_ADDRESS: address}}},
    }
    return _app(f"app-{index:04}", namespace, spec)


def real_app(name: str, image: str, namespace: str = NAMESPACE) -> dict[str, Any]:
    """Return an app whose pod runs: a small program that answers every probe at once stands for the worker."""
    probes = {f"{name}Probe": {"httpGet": {"path": "/"}} for name in ("startup", "readiness", "liveness")}
    spec = {
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "workerClass": "app:Worker",
        "numGPUs": 0,
        "env": [{"name": "REVISION", "value": "1"}],
        "podTemplate": {"spec": {"containers": [{"name": "worker", **probes}]}},
    }
    return _app(name, namespace, spec)


def _app(name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": API_VERSION, "kind": "DistributedApp", "metadata": meta, "spec": spec}


def children(app: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the operator makes of ``app``, without an owner."""
    machine = {**machine_type(), "metadata": {"name": _MACHINE, "uid": "-"}}
    raw = {**app, "metadata": {**app["metadata"], "uid": "-", "generation": 1}}
    found = []
    for action in plan(raw, Observed(machine_types=(machine,)), datetime.now(UTC)):
        if isinstance(action, Apply):
            meta = {key: value for key, value in action.manifest["metadata"].items() if key != "ownerReferences"}
            found.append({**action.manifest, "metadata": meta})
    return found
