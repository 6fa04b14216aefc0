"""Any cluster that the user's KUBECONFIG points to: `CLUSTER=current`. We make nothing in it and remove nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import ClusterError
from .kind import report_nodes
from .layout import GPU_RESOURCE, Shape
from .nodes import gpus_of
from .process import command


def obstacle() -> str:
    """Why there is no such cluster; empty where there is."""
    if not shutil.which("kubectl"):
        return "CLUSTER=current needs `kubectl` on PATH"
    try:
        command("kubectl", "version", "--request-timeout=10s")
    except ClusterError as error:
        return f"CLUSTER=current: no answer from the cluster of your kubeconfig; set KUBECONFIG ({error})"
    return ""


class CurrentCluster:
    """Somebody else's cluster."""

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self._say = report

    @property
    def kubeconfig(self) -> Path:
        """The user's; the first file where KUBECONFIG names several."""
        first = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
        return Path(first) if first else Path.home() / ".kube" / "config"

    def up(self, shape: Shape | None = None) -> None:
        """Check that it answers and has GPUs.

        Args:
            shape: Ignored: the cluster is what it is.

        Raises:
            ClusterError: It does not answer, or none of its nodes has a GPU.
        """
        del shape
        if reason := obstacle():
            raise ClusterError(reason)
        nodes = json.loads(self.kubectl("get", "nodes", "--output=json"))["items"]
        if not any(map(gpus_of, nodes)):
            raise ClusterError(
                f"no node of this cluster offers {GPU_RESOURCE}; install a device plugin (e2e/README.md has one for tests)"
            )

    def down(self) -> None:
        """Leave it alone."""
        self._say("CLUSTER=current: nothing was made, so nothing is removed")

    def status(self) -> bool:
        """Say what its nodes are."""
        return report_nodes(json.loads(self.kubectl("get", "nodes", "--output=json"))["items"], self._say)

    def load_image(self, path: Path, name: str = "") -> None:
        """Not possible: we cannot know how images get there.

        Raises:
            ClusterError: Always, with the cure.
        """
        del name
        raise ClusterError(f"CLUSTER=current: push {path.name} to a registry that the cluster pulls from")

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl as the user and return what it prints."""
        return command("kubectl", *arguments, input=input)

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl, helm and tests reach this cluster."""
        return dict(os.environ)
