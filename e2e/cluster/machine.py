"""What the machine must have, and how it gets there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import ClusterError
from .network import BRIDGE_FILTER

#: Debian package by command.
PACKAGES: Mapping[str, str] = {
    "ip": "iproute2",
    "mount": "mount",
    "nft": "nftables",
    "nsenter": "util-linux",
    "runc": "runc",
    "unshare": "util-linux",
}
#: For building images.
IMAGE_PACKAGES: Mapping[str, str] = {"buildah": "buildah", "debootstrap": "debootstrap", "skopeo": "skopeo"}
ELSEWHERE = "use CLUSTER=kind (with Docker and kind) or CLUSTER=current (with a kubeconfig) instead"


def check() -> None:
    """Refuse a machine that cannot run the cluster.

    Raises:
        ClusterError: It is not Linux, we are not root, or the kernel lacks something.
    """
    if reason := obstacle():
        raise ClusterError(f"{reason}; {ELSEWHERE}")


def obstacle() -> str:
    """Why this machine cannot run the cluster; empty where it can. Missing packages do not count."""
    if sys.platform != "linux":
        return f"the cluster needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "the cluster needs root for its namespaces"
    missing = [name for name in PACKAGES if not shutil.which(name)]
    if missing and not shutil.which("apt-get"):
        return f"not installed: {', '.join(missing)}, and there is no apt-get"
    return ""


def install(commands: Mapping[str, str] = PACKAGES, report: Callable[[str], None] = print) -> None:
    """Install the Debian packages of commands that are missing.

    Args:
        commands: Package by command.
        report: Told what is installed.

    Raises:
        ClusterError: They cannot be installed; the message names the packages.
    """
    packages = sorted({package for name, package in commands.items() if not shutil.which(name)})
    if not packages:
        return
    manual = f"install the packages {' '.join(packages)} (names in Debian and Ubuntu)"
    if not shutil.which("apt-get"):
        raise ClusterError(f"there is no apt-get here: {manual}")
    if os.geteuid() != 0:
        raise ClusterError(f"not root: {manual}")
    report(f"installing {' '.join(packages)}")
    line = ["apt-get", "install", "--yes", "--quiet", "--quiet", "--no-install-recommends", *packages]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(line, env=environment, capture_output=True, check=False).returncode == 0:
        return
    # The usual reason is a package list that is old or was never fetched.
    subprocess.run(["apt-get", "update", "--quiet", "--quiet"], env=environment, capture_output=True, check=False)
    result = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(f"{manual}; apt-get said: {result.stderr.strip()}")


def load_modules() -> None:
    """Kernel modules that may not be loaded yet.

    Raises:
        ClusterError: The kernel has no bridge filter, without which Services fail inside a node.
    """
    for module in ("overlay", "br_netfilter"):
        if shutil.which("modprobe"):
            subprocess.run(["modprobe", "--quiet", module], check=False)
    if not BRIDGE_FILTER.exists():
        raise ClusterError(f"the kernel module br_netfilter is missing ({BRIDGE_FILTER}); {ELSEWHERE}")


def check_state_directory(directory: Path) -> None:
    """Containers' file systems are overlays, which cannot lie on an overlay.

    Raises:
        ClusterError: The directory is on one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", directory], capture_output=True, text=True, check=True
    ).stdout.strip()
    if kind == "overlayfs":
        raise ClusterError(f"{directory} is on an overlay; set E2E_CLUSTER_DIR to a directory on a disk or volume")
