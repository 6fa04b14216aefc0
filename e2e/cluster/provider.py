"""Which cluster is meant: `$CLUSTER` is `local` (the default), `kind` or `current`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from . import current, kind, machine
from .errors import ClusterError
from .layout import Shape
from .local import LocalCluster


class Cluster(Protocol):
    """What tests and the command line need of a cluster, whatever it is made of."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""

    def up(self, shape: Shape | None = None) -> None:
        """Start it, or what is missing of it."""

    def down(self) -> None:
        """Remove what `up` made."""

    def status(self) -> bool:
        """Say what runs; whether all of it does."""

    def load_image(self, path: Path, name: str = "") -> None:
        """Bring images into every node."""

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl and return what it prints."""

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl, helm and tests reach it."""


def kind_of_cluster(environment: Mapping[str, str] = os.environ) -> str:
    """`local`, `kind` or `current`.

    Raises:
        ClusterError: `$CLUSTER` is something else.
    """
    name = environment.get("CLUSTER") or "local"
    if name not in {"local", "kind", "current"}:
        raise ClusterError(f"CLUSTER={name}: must be local, kind or current")
    return name


def choose(report: Callable[[str], None] = print) -> Cluster:
    """The cluster that `$CLUSTER` names."""
    match kind_of_cluster():
        case "kind":
            return kind.KindCluster(report=report)
        case "current":
            return current.CurrentCluster(report=report)
        case _:
            return LocalCluster(report=report)


def obstacle() -> str:
    """Why that cluster cannot be had here, and what could be instead; empty where it can."""
    match kind_of_cluster():
        case "kind":
            return kind.obstacle()
        case "current":
            return current.obstacle()
        case _:
            reason = machine.obstacle()
            return f"{reason}; {machine.ELSEWHERE}" if reason else ""
