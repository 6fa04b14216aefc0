"""What the cluster is made of: Go programs, pinned by `tools/*/go.mod`, and the images that hold one of them.

A cache key is a hash of everything that decides about the result: the module files, our own sources, the build flags, the
platform. The version of the Go compiler is not part of it, so a machine with cached binaries needs no Go.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ClusterError
from .layout import CHECKOUT

TOOLS_DIRECTORY = CHECKOUT / "tools"
REGISTRY = "localhost/drumline"


def _commands(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"{prefix}/{name}" for name in names}


@dataclass(frozen=True)
class Tool:
    """A directory of `tools/` with its own go.mod.

    Attributes:
        directory: Its name.
        module: The module whose version is the tool's version.
        programs: Package path by the name of the binary.
        tags: Build tags.
        version_variables: Variables that the linker sets to the version.
        images: User (`uid:gid`, empty for root) by the name of the binary that becomes an image of its own.
        on_demand: Whether `up` does without it.
    """

    directory: str
    module: str
    programs: Mapping[str, str]
    tags: str = ""
    version_variables: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    on_demand: bool = False


TOOLS = (
    Tool(
        "kubernetes",
        "k8s.io/kubernetes",
        _commands(
            "k8s.io/kubernetes/cmd",
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kubelet",
            "kube-proxy",
            "kubectl",
        ),
        tags="selinux,notest,grpcnotrace",
        version_variables=("k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"),
    ),
    Tool("etcd", "go.etcd.io/etcd/server/v3", {"etcd": "go.etcd.io/etcd/server/v3"}),
    Tool(
        "containerd",
        "github.com/containerd/containerd/v2",
        _commands("github.com/containerd/containerd/v2/cmd", "containerd", "containerd-shim-runc-v2", "ctr"),
        tags="no_btrfs,no_zfs,no_devmapper,no_aufs,grpcnotrace",
        version_variables=("github.com/containerd/containerd/v2/version.Version",),
    ),
    Tool(
        "cni-plugins",
        "github.com/containernetworking/plugins",
        {
            "bridge": "github.com/containernetworking/plugins/plugins/main/bridge",
            "host-local": "github.com/containernetworking/plugins/plugins/ipam/host-local",
            "portmap": "github.com/containernetworking/plugins/plugins/meta/portmap",
        },
    ),
    Tool("coredns", "github.com/coredns/coredns", {"coredns": "."}, images={"coredns": ""}),
    Tool(
        "images",
        "k8s.io/kubelet",
        _commands(".", "pause", "fakegpu", "probe"),
        images={"pause": "65535:65535", "fakegpu": "", "probe": "65535:65535"},
    ),
    Tool(
        "helm",
        "helm.sh/helm/v4",
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        version_variables=("helm.sh/helm/v4/internal/version.version",),
        on_demand=True,
    ),
    Tool(
        "kwok",
        "sigs.k8s.io/kwok",
        {"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
        version_variables=("sigs.k8s.io/kwok/pkg/consts.Version",),
        on_demand=True,
    ),
    Tool(
        "kubeconform",
        "github.com/yannh/kubeconform",
        {"kubeconform": "github.com/yannh/kubeconform/cmd/kubeconform"},
        version_variables=("main.version",),
        on_demand=True,
    ),
)

#: By the name of the binary.
OWNERS: Mapping[str, Tool] = {program: tool for tool in TOOLS for program in tool.programs}
#: The names of all images made of one binary.
IMAGES: tuple[str, ...] = tuple(image for tool in TOOLS for image in tool.images)
#: Those that every node has from its start.
NODE_IMAGES = ("pause", "coredns", "fakegpu")
#: What the API server alone needs; `make envtest` builds no more than these.
ENVTEST_PROGRAMS = ("etcd", "kube-apiserver")
#: What `up` needs.
CLUSTER_PROGRAMS = tuple(program for program, tool in OWNERS.items() if not tool.on_demand)


def system() -> tuple[str, str]:
    """GOOS and GOARCH of this machine."""
    machine = platform.machine().lower()
    return sys.platform, {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def version(tool: Tool, tools: Path = TOOLS_DIRECTORY) -> str:
    """The version of the tool's module, such as `v1.36.3`.

    Raises:
        ClusterError: The go.mod does not require the module.
    """
    path = tools / tool.directory / "go.mod"
    found = re.search(rf"^(?:require)?\s+{re.escape(tool.module)} (v\S+)", path.read_text(), re.MULTILINE)
    if not found:
        raise ClusterError(f"{path} does not require {tool.module}; run `go get {tool.module}@latest` there")
    return found[1]


def sources(tool: Tool, tools: Path = TOOLS_DIRECTORY) -> list[Path]:
    """The files that decide what is built, sorted."""
    directory = tools / tool.directory
    return sorted([directory / "go.mod", directory / "go.sum", *directory.rglob("*.go")])


def flags(tool: Tool, tools: Path = TOOLS_DIRECTORY) -> list[str]:
    """The arguments of `go build`, without output and packages."""
    number = version(tool, tools)
    linker = ["-s", "-w", *(f"-X={variable}={number}" for variable in tool.version_variables)]
    if tool.directory == "kubernetes":
        major, minor = number.removeprefix("v").split(".")[:2]
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            linker += [f"-X={package}.gitMajor={major}", f"-X={package}.gitMinor={minor}"]
            linker += [f"-X={package}.gitTreeState=clean"]
    return ["-trimpath", "-buildvcs=false", f"-tags={tool.tags}", f"-ldflags={' '.join(linker)}"]


def key(tool: Tool, tools: Path = TOOLS_DIRECTORY) -> str:
    """A name for the result of building `tool`: the directory's name and a hash of the pins."""
    digest = hashlib.sha256(json.dumps([flags(tool, tools), dict(tool.images), *system()]).encode())
    for path in sources(tool, tools):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(tools)} {len(content)}\n".encode())
        digest.update(content)
    return f"{tool.directory}-{digest.hexdigest()[:16]}"


def image_reference(name: str, tools: Path = TOOLS_DIRECTORY) -> str:
    """The image that holds the binary `name`; the tag changes with its pins, so a node never runs an old one."""
    return f"{REGISTRY}/{name}:{key(OWNERS[name], tools).rpartition('-')[2]}"
