"""The image of the client's pod: curl and git."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from e2e.cluster.builder import Builder
from e2e.cluster.errors import ClusterError
from e2e.cluster.kind import KindCluster
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.local import LocalCluster
from e2e.cluster.pins import REGISTRY
from e2e.cluster.provider import Cluster

DOCKERFILE: Final = CHECKOUT / "e2e" / "images" / "client" / "Dockerfile"


def client(cluster: Cluster) -> str:
    """Have the client's image in every node of a cluster, built anew when its Dockerfile has changed; its name.

    Raises:
        ClusterError: It cannot be built or brought in; the message has the reason.
    """
    name = f"{REGISTRY}/client:{hashlib.sha256(DOCKERFILE.read_bytes()).hexdigest()[:16]}"
    match cluster:
        case LocalCluster():
            builder = Builder(report=lambda _: None)
            layout = builder.layout(name)
            if not (layout / "index.json").exists():
                builder.build(name, DOCKERFILE, DOCKERFILE.parent)
            cluster.load_image(layout)
        case KindCluster():
            cluster.build_image(name, DOCKERFILE, DOCKERFILE.parent)
        case _:
            if not (given := os.environ.get("E2E_CLIENT_IMAGE")):
                raise ClusterError(f"build {DOCKERFILE}, push it, and set E2E_CLIENT_IMAGE to its name")
            return given
    return name
