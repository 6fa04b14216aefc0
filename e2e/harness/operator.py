"""The operator, installed with the project's chart as a user would, and the ways in which scenarios take it away."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from e2e.cluster.layout import CHECKOUT
from e2e.cluster.process import command
from e2e.cluster.provider import Cluster
from e2e.cluster.store import Store
from e2e.harness.kube import Kube, Object, has

CHART: Final = CHECKOUT / "charts" / "drumline"
NAMESPACE: Final = "drumline-system"
RELEASE: Final = "drumline"
DEPLOYMENT: Final = "drumline-operator"
LEASE: Final = "drumline-operator"
#: The chart's default.
REPLICAS: Final = 2
SELECTOR: Final = f"app.kubernetes.io/name={DEPLOYMENT}"


class Operator:
    """A release of the chart: one per cluster, as its CRDs are the cluster's."""

    def __init__(self, cluster: Cluster, store: Store | None = None) -> None:
        self.cluster, self.kube = cluster, Kube(cluster, NAMESPACE)
        self._store = store or Store()

    def helm(self, *arguments: str) -> str:
        """Run helm in the operator's namespace and return what it prints.

        Raises:
            ClusterError: It failed; the message has its words.
        """
        self._store.ensure(["helm"])
        homes = {
            f"HELM_{name}_HOME": str(self._store.root / "helm-home" / name.lower())
            for name in ("CACHE", "CONFIG", "DATA")
        }
        program = self._store.program("helm")
        return command(program, f"--namespace={NAMESPACE}", *arguments, env=self.cluster.environment() | homes)

    def install(self, values: Mapping[str, str]) -> None:
        """Install the chart, or bring an earlier release up to date, and wait until both operators are ready.

        Args:
            values: The chart's, by their dotted names.
        """
        # Labelled first: our own pods have to fit the restricted profile, too.
        namespace = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
        self.kube.apply(namespace)
        chosen = [f"--set-string={key}={value}" for key, value in values.items()]
        self.helm("upgrade", "--install", RELEASE, str(CHART), "--wait", "--timeout=300s", *chosen)
        self.settled()

    def uninstall(self) -> None:
        """Remove the release and its namespace; CRDs and apps stay, as the chart promises."""
        self.helm("uninstall", RELEASE, "--wait", "--timeout=180s")
        self.kube("delete", "namespace", NAMESPACE, "--timeout=180s")

    def pods(self) -> list[Object]:
        """The operators' pods that are not on their way out."""
        return [each for each in self.kube.list("pod", SELECTOR) if _stays(each)]

    def settled(self) -> dict[str, Object]:
        """Wait until both operators are ready, and none of before is left; their pods by name.

        helm and `kubectl rollout status` return while the old ones still end.
        """
        return self.kube.until_all(
            "pod",
            lambda pods: [has("Ready", "True")(each) and _stays(each) for each in pods.values()] == [True] * REPLICAS,
            "the operators are ready, and no others are there",
            selector=SELECTOR,
        )

    def gone(self) -> None:
        """Wait until no pod of an operator is left: the garbage collector removes them after their Deployment."""
        self.kube.until_all("pod", lambda pods: not pods, "the operators are gone", selector=SELECTOR)

    def leader(self) -> str:
        """The pod that holds the lease, once it is one that is there: the name of one that is gone may still stand there."""
        there = self.settled()
        return _holder(self.kube.until("lease", LEASE, lambda item: _holder(item) in there, "an operator leads"))

    def kill_leader(self) -> str:
        """Kill the leader without a chance to hand over, and wait until another one leads; its pod's name."""
        lost = self.leader()
        self.kube("delete", "pod", lost, "--grace-period=0", "--force")
        self.kube.until("lease", LEASE, lambda lease: _holder(lease) not in {"", lost}, "another operator leads")
        return lost

    def stop(self) -> None:
        """Have no operator, until `start`."""
        self.kube("scale", f"deployment/{DEPLOYMENT}", "--replicas=0")
        self.gone()

    def start(self) -> None:
        """Have two operators again."""
        self.kube("scale", f"deployment/{DEPLOYMENT}", f"--replicas={REPLICAS}")
        self.settled()

    def logs(self) -> str:
        """The end of what they printed."""
        return self.kube("logs", f"--selector={SELECTOR}", "--prefix", "--tail=150")


def _stays(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"]


def _holder(lease: Object) -> str:
    """The pod in the holder's identity, which may have more after an underscore."""
    return str(lease["spec"].get("holderIdentity") or "").partition("_")[0]


def given_images() -> dict[str, str]:
    """Images that a cluster can pull, where we cannot bring ours in: by what they are for."""
    names = {name: os.environ.get(f"E2E_{name.upper()}_IMAGE", "") for name in ("worker", "operator", "client")}
    return {name: image for name, image in names.items() if image}
