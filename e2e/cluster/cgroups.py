"""The cgroups of the nodes' pods, on cgroup v1 (a tree per controller) and v2 (one tree).

Making a cluster's top cgroup is also what reserves its network: `mkdir` succeeds for one of several that try at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import ClusterError
from .waiting import wait_for

ROOT = Path("/sys/fs/cgroup")
#: What the kubelet wants to see in a node's cgroup (v2).
NEEDED = ("cpuset", "cpu", "memory", "pids")


def is_unified(root: Path = ROOT) -> bool:
    """Whether this is cgroup v2 alone."""
    return (root / "cgroup.controllers").exists()


def trees(root: Path = ROOT) -> list[Path]:
    """The roots of the hierarchies in which a node needs a cgroup."""
    if is_unified(root):
        return [root]
    found = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()]
    found = [path for path in found if (path / "tasks").exists()]
    if not found:
        raise ClusterError(f"no cgroups under {root}; mount them, or use CLUSTER=kind")
    return found


def reserve(name: str, root: Path = ROOT) -> bool:
    """Make the cluster's top cgroup in the first tree; False when there is one of that name."""
    try:
        (trees(root)[0] / name).mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise ClusterError(f"no cgroup can be made under {root}: {error.strerror}; use CLUSTER=kind") from error
    return True


def create(name: str, nodes: Iterable[str], root: Path = ROOT) -> None:
    """Complete a reserved cgroup: one for each node in each tree.

    Args:
        name: What was given to `reserve`.
        nodes: Names of the nodes.
        root: Where cgroups are mounted.

    Raises:
        ClusterError: The machine does not let us have the controllers that the kubelet needs.
    """
    children = list(nodes)
    for tree in trees(root):
        top = tree / name
        top.mkdir(exist_ok=True)
        if is_unified(root):
            _enable(tree)
            _enable(top)
        for directory in (top, *(top / child for child in children)):
            directory.mkdir(exist_ok=True)
            if tree.name == "cpuset":  # v1: empty in a new cgroup, and then nothing can run in it
                for setting in ("cpuset.cpus", "cpuset.mems"):
                    (directory / setting).write_text((directory.parent / setting).read_text())


def _enable(directory: Path) -> None:
    """Hand all controllers of a v2 cgroup down to its children."""
    available = (directory / "cgroup.controllers").read_text().split()
    if missing := sorted(set(NEEDED) - set(available)):
        raise ClusterError(
            f"{directory} has no cgroup controllers {', '.join(missing)}; this is likely a container: start it with "
            "`--privileged --cgroupns=host`, or use CLUSTER=kind"
        )
    control = directory / "cgroup.subtree_control"
    for controller in sorted(set(available) - set(control.read_text().split())):
        try:
            control.write_text(f"+{controller}")
        except OSError as error:
            if controller in NEEDED:
                raise ClusterError(
                    f"the cgroup controller {controller} cannot be handed down from {directory} ({error.strerror}); "
                    "this is likely a container: start it with `--cgroupns=host`, or use CLUSTER=kind"
                ) from error


def remove(name: str, root: Path = ROOT, limit: float = 10.0) -> None:
    """Remove the cluster's cgroups from every tree, once the kernel has let their processes go.

    Args:
        name: What was given to `reserve`.
        root: Where cgroups are mounted.
        limit: Seconds.

    Raises:
        ClusterError: Something still runs in one of them.
    """
    # runc makes a cgroup in every tree, also in those (v1: `unified`) that we do not use.
    candidates = [root, *(path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink())]
    for top in (candidate / name for candidate in candidates):
        if top.exists():
            wait_for(f"the removal of {top}", lambda top=top: _removed(top), limit=limit)  # type: ignore[misc]


def _removed(top: Path) -> bool:
    for directory, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass
        except OSError:  # busy: its last processes are still dying
            return False
    return not top.exists()
