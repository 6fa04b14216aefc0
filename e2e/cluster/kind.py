"""The same cluster in kind, where Docker is: `CLUSTER=kind`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import objects
from .errors import ClusterError
from .layout import CHECKOUT, GPU_RESOURCE, NODE_LABEL, Layout, Shape
from .nodes import gpus_of, is_ready, is_usable, state
from .process import command
from .store import Store

CONFIG = CHECKOUT / "e2e" / "kind.yaml"
NAME = "drumline"
#: Names another image of nodes than kind's own default: another version of Kubernetes.
NODE_IMAGE = "E2E_KIND_IMAGE"
#: A node of kind first pulls its image.
LIMIT = "300s"


def obstacle() -> str:
    """Why kind cannot be used here; empty where it can."""
    for name in ("docker", "kind", "kubectl"):
        if not shutil.which(name):
            return f"CLUSTER=kind needs `{name}` on PATH"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "CLUSTER=kind needs a Docker daemon that answers (`docker info`)"
    return ""


class KindCluster:
    """A kind cluster named `drumline`, as `e2e/kind.yaml` describes it, with our device plugin."""

    def __init__(
        self, layout: Layout | None = None, store: Store | None = None, report: Callable[[str], None] = print
    ) -> None:
        self.layout = layout or Layout.default()
        self.store = store or Store(report=report)
        self._say = report

    @property
    def kubeconfig(self) -> Path:
        """Our own; kind is told not to touch the user's."""
        return self.layout.kubeconfig

    def up(self, shape: Shape | None = None) -> None:
        """Create it unless it is there, and wait until its nodes have their GPUs.

        Args:
            shape: Only its `gpus` counts; the nodes are those of `e2e/kind.yaml`.

        Raises:
            ClusterError: Docker, kind or kubectl is missing, or one of them failed.
        """
        if reason := obstacle():
            raise ClusterError(reason)
        self.store.ensure(["fakegpu"])
        gpus = (shape or Shape()).gpus
        self.layout.state.mkdir(parents=True, exist_ok=True)
        if NAME not in command("kind", "get", "clusters").split():
            arguments = [f"--name={NAME}", f"--config={CONFIG}", f"--kubeconfig={self.kubeconfig}", f"--wait={LIMIT}"]
            if image := os.environ.get(NODE_IMAGE):
                arguments.append(f"--image={image}")
            command("kind", "create", "cluster", *arguments)
        elif not self.kubeconfig.exists():
            command("kind", "export", "kubeconfig", f"--name={NAME}", f"--kubeconfig={self.kubeconfig}")
        self.load_image(self.store.image("fakegpu"))
        plugin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects.gpu_plugin(gpus)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", input=plugin)
        nodes = ["node", f"--selector={NODE_LABEL}=true", f"--timeout={LIMIT}"]
        self.kubectl("wait", "--for=condition=Ready", *nodes)
        self.kubectl("wait", f"--for=jsonpath={{.status.allocatable.nvidia\\.com/gpu}}={gpus}", *nodes)

    def down(self) -> None:
        """Remove the cluster and its kubeconfig."""
        command("kind", "delete", "cluster", f"--name={NAME}", f"--kubeconfig={self.kubeconfig}")
        self.kubeconfig.unlink(missing_ok=True)

    def status(self) -> bool:
        """Say what its nodes are."""
        return report_nodes(self._nodes(), self._say)

    def _nodes(self, *options: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", "nodes", *options, "--output=json"))["items"]
        return items

    def load_image(self, path: Path, name: str = "") -> None:
        """Bring the images of an OCI or Docker archive into every node.

        Args:
            path: A tar file.
            name: Must be empty: archives for kind carry their names.
        """
        if name or path.is_dir():
            raise ClusterError("kind loads tar files whose images have names (`docker save`), nothing else")
        command("kind", "load", "image-archive", str(path), f"--name={NAME}")

    def build_image(self, name: str, dockerfile: Path, context: Path) -> None:
        """Build a Dockerfile with Docker and bring the image into every node that takes pods.

        Args:
            name: Of the image, full and with a tag.
            dockerfile: The Dockerfile.
            context: The folder that COPY sees.
        """
        build(name, dockerfile, context)
        nodes = ",".join(each["metadata"]["name"] for each in self._nodes(f"--selector={NODE_LABEL}=true"))
        command("kind", "load", "docker-image", name, f"--name={NAME}", f"--nodes={nodes}")

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl as the administrator and return what it prints."""
        return command("kubectl", *arguments, env=self.environment(), input=input)

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl, helm and tests reach this cluster."""
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}


def build(name: str, dockerfile: Path, context: Path) -> None:
    """Build a Dockerfile with Docker, such that kind can load the image.

    Args:
        name: Of the image, full and with a tag.
        dockerfile: The Dockerfile.
        context: The folder that COPY sees.

    Raises:
        ClusterError: The build failed; the message has its output.
    """
    # `docker save` leaves attestations out where Docker keeps images in containerd, and kind then misses them.
    # Docker before 23 builds with BuildKit, which the Dockerfiles need, only when it is told to.
    plain = os.environ | {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1", "DOCKER_BUILDKIT": "1"}
    command("docker", "build", f"--tag={name}", f"--file={dockerfile}", str(context), env=plain)


def report_nodes(nodes: list[dict[str, Any]], say: Callable[[str], None]) -> bool:
    """Say what nodes are and how many GPUs they have.

    Args:
        nodes: Of a cluster whose control plane may have a taint that keeps pods away.
        say: Told a line for each.

    Returns:
        Whether all are Ready and one with GPUs takes pods.
    """
    for node in nodes:
        say(f"{node['metadata']['name']:32} {state(node)}, {GPU_RESOURCE} {gpus_of(node)}")
    return all(map(is_ready, nodes)) and any(is_usable(node) and gpus_of(node) for node in nodes)
