"""The objects that every test cluster has: its DNS, and the device plugin that advertises GPUs."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import yaml

from . import pins
from .errors import ClusterError
from .layout import CLUSTER_DOMAIN, NODE_LABEL, PACKAGE, Network

DIRECTORY = PACKAGE / "manifests"
#: How the API names a kind in its paths, for the kinds that our manifests use; True where it lies in a namespace.
RESOURCES = {
    "ClusterRole": ("clusterroles", False),
    "ClusterRoleBinding": ("clusterrolebindings", False),
    "ConfigMap": ("configmaps", True),
    "DaemonSet": ("daemonsets", True),
    "Deployment": ("deployments", True),
    "Namespace": ("namespaces", False),
    "Service": ("services", True),
    "ServiceAccount": ("serviceaccounts", True),
}


def render(name: str, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of one manifest file.

    Args:
        name: Of the file, without `.yaml`.
        values: For its ${NAMES}.

    Raises:
        ClusterError: The file asks for a name that has no value.
    """
    text = (DIRECTORY / f"{name}.yaml").read_text()
    try:
        filled = string.Template(text).substitute(values)
    except KeyError as error:
        raise ClusterError(f"manifests/{name}.yaml: no value for ${{{error.args[0]}}}") from error
    return [item for item in yaml.safe_load_all(filled) if item]


def gpu_plugin(gpus: int) -> list[dict[str, Any]]:
    """The device plugin; it also serves in clusters that are not ours, such as kind.

    Args:
        gpus: How many each labelled node advertises.
    """
    image = pins.image_reference("fakegpu")
    return render("fakegpu", {"NODE_LABEL": NODE_LABEL, "IMAGE_FAKEGPU": image, "GPUS": str(gpus)})


def dns(network: Network) -> list[dict[str, Any]]:
    """CoreDNS behind the Service address that every pod is given."""
    image = pins.image_reference("coredns")
    values = {"CLUSTER_DOMAIN": CLUSTER_DOMAIN, "DNS_ADDRESS": network.dns, "IMAGE_COREDNS": image}
    return render("coredns", values)


def api_path(item: Mapping[str, Any]) -> str:
    """Where the API has an object of ours.

    Raises:
        ClusterError: The kind is not in `RESOURCES`.
    """
    kind, version = item["kind"], item["apiVersion"]
    if kind not in RESOURCES:
        raise ClusterError(f"{kind} is not in RESOURCES; add how the API names it in paths")
    plural, namespaced = RESOURCES[kind]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    place = f"/namespaces/{item['metadata']['namespace']}" if namespaced else ""
    return f"{root}{place}/{plural}/{item['metadata']['name']}"
