"""The command line: `python -m e2e.cluster COMMAND`."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from . import fake_nodes, kind, machine, pins, project, provider, schemas
from .builder import Builder
from .envtest import EnvTest
from .errors import ClusterError
from .layout import CHECKOUT, Shape
from .local import LocalCluster
from .provider import Cluster, choose
from .store import Store


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(
        prog="python -m e2e.cluster",
        description="A real Kubernetes for tests. CLUSTER=local (default: two nodes on this Linux machine), kind or current.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build the pinned Go programs and images into the user's cache")
    build.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"one of {', '.join(pins.OWNERS)} (default: all)")
    commands.add_parser("prune", help="remove builds of other versions from the user's cache")
    commands.add_parser("packages", help="install the Debian packages that the cluster needs")
    commands.add_parser("prepare", help="packages, programs and images, where a cluster on this machine is possible")
    up = commands.add_parser("up", help="start the cluster, or what is missing of it")
    up.add_argument("--nodes", type=int, help="default: 2")
    up.add_argument("--gpus", type=int, help="GPUs of each node (default: 8)")
    up.add_argument("--proxy-mode", choices=("nftables", "iptables"), help="kube-proxy's (default: nftables)")
    up.add_argument("--label", action="append", metavar="NODE:KEY=VALUE", help="a node's label; may be given again")
    commands.add_parser("down", help="remove the cluster")
    commands.add_parser("status", help="show what runs; fails unless all of it does")
    load = commands.add_parser("load-image", help="bring the images of an OCI layout (folder or tar) into every node")
    load.add_argument("--name", default="", help="the image's full name, if the layout has none")
    load.add_argument("path", type=Path, nargs="+")
    image = commands.add_parser("build-image", help="build a Dockerfile with buildah; prints the OCI layout")
    image.add_argument("--name", required=True, help="full, with a tag: localhost/drumline/worker:e2e")
    image.add_argument("--file", type=Path, required=True, help="the Dockerfile")
    image.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    image.add_argument("context", type=Path, nargs="?", default=CHECKOUT, help="default: the checkout")
    own = commands.add_parser(
        "images", help="build the project's own images, and load them into the cluster if it runs"
    )
    own.add_argument("roles", nargs="*", metavar="ROLE", help=f"{' or '.join(project.ROLES)} (default: all)")
    commands.add_parser("kubeconfig", help="print the path of the administrator's kubeconfig")
    kubectl = commands.add_parser("kubectl", help="run kubectl")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    helm = commands.add_parser("helm", help="run helm")
    helm.add_argument("arguments", nargs=argparse.REMAINDER)
    conform = commands.add_parser("conform", help="check manifests against the schemas of Kubernetes and of our CRDs")
    conform.add_argument("--crd", type=Path, action="append", default=[], help="a file of CustomResourceDefinitions")
    conform.add_argument("manifests", type=Path, nargs="+", help="YAML files or folders; - is standard input")
    fakes = commands.add_parser("fake-nodes", help="have so many more nodes, which only exist in the API")
    fakes.add_argument("count", type=int)
    fakes.add_argument("--gpus", type=int, default=8)
    fakes.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    for name, words in (("stop", "kill one component, for tests of failures"), ("start", "start one component")):
        one = commands.add_parser(name, help=words)
        one.add_argument("node")
        one.add_argument("component")
    execute = commands.add_parser("exec", help="run a command on a node")
    execute.add_argument("node")
    execute.add_argument("arguments", nargs=argparse.REMAINDER)
    envtest = commands.add_parser(
        "envtest", help="etcd and the API server alone, for the time of a command (default: until Ctrl-C)"
    )
    envtest.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return top


def shape(arguments: argparse.Namespace) -> Shape | None:
    """What the options of `up` ask for, or None where they ask for nothing.

    Raises:
        ClusterError: An option makes no sense.
    """
    labels: dict[str, dict[str, str]] = {}
    nodes = arguments.nodes or Shape.nodes
    for label in arguments.label or []:
        node, _, pair = label.partition(":")
        key, separator, value = pair.partition("=")
        if node not in {f"node-{i}" for i in range(1, nodes + 1)} or not separator:
            raise ClusterError(f"--label {label}: must be NODE:KEY=VALUE with a node from node-1 to node-{nodes}")
        labels.setdefault(node, {})[key] = value
    given = {"nodes": arguments.nodes, "gpus": arguments.gpus, "proxy_mode": arguments.proxy_mode, "labels": labels}
    chosen = {name: value for name, value in given.items() if value not in (None, {})}
    if arguments.nodes is not None and not 1 <= arguments.nodes <= 9:
        raise ClusterError(f"--nodes {arguments.nodes}: must be 1 to 9")
    if arguments.gpus is not None and arguments.gpus < 0:
        raise ClusterError(f"--gpus {arguments.gpus}: must not be negative")
    return Shape(**chosen) if chosen else None


def command_of(arguments: Sequence[str]) -> list[str]:
    """What follows `--`."""
    return list(arguments[1:] if arguments[:1] == ["--"] else arguments)


def envtest(arguments: Sequence[str]) -> int:
    """Run a command with KUBECONFIG set, or wait for Ctrl-C; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave the block in order
    with EnvTest(report=lambda line: print(line, flush=True)) as server:
        if line := command_of(arguments):
            return subprocess.run(line, env=server.environment(), check=False).returncode
        print(f"export KUBECONFIG={server.kubeconfig}\nCtrl-C ends it", flush=True)
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigwait(ends)
    return 0


def conform(store: Store, manifests: Sequence[Path], crds: Sequence[Path]) -> int:
    """Check manifests strictly: an unknown field is an error; the exit status."""
    store.ensure(["kubeconform"])
    definitions = [item for path in crds for item in yaml.safe_load_all(path.read_text()) if item]
    with tempfile.TemporaryDirectory(prefix="drumline-schemas-") as directory:
        schemas.write(Path(directory), store.specification(), definitions)
        location = f"{directory}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
        options = ["-strict", "-summary", f"-schema-location={location}"]
        line = [str(store.program("kubeconform")), *options, *map(str, manifests)]
        return subprocess.run(line, check=False).returncode


def helm(store: Store, cluster: Cluster, arguments: Sequence[str]) -> int:
    """Run helm with the cluster's kubeconfig, and its own files in our cache instead of the home directory."""
    store.ensure(["helm"])
    homes = {f"HELM_{name}_HOME": str(store.root / "helm-home" / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    line = [str(store.program("helm")), *command_of(arguments)]
    return subprocess.run(line, env=cluster.environment() | homes, check=False).returncode


def say(line: str) -> None:
    """Tell about progress without getting into what is printed as the answer."""
    print(line, file=sys.stderr, flush=True)


def own_images(cluster: Cluster, names: Sequence[str]) -> None:
    """Build the project's images; print their names where they got into a cluster, else the places of their layouts."""
    if unknown := sorted(set(names) - set(project.ROLES)):
        raise ClusterError(f"there is no image {', '.join(unknown)}; there are {', '.join(project.ROLES)}")
    for role in project.ROLES:
        if names and role not in names:
            continue
        if cluster.kubeconfig.exists():
            print(project.ensure(cluster, role, say))
        else:
            print(project.ProjectImage(role).layout(Builder(report=say)))


def _local(cluster: Cluster, command: str) -> LocalCluster:
    if not isinstance(cluster, LocalCluster):
        raise ClusterError(f"`{command}` works with CLUSTER=local only")
    return cluster


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the exit status."""
    match arguments.command:
        case "build":
            if unknown := sorted(set(arguments.programs) - set(pins.OWNERS)):
                raise ClusterError(f"there is no {', '.join(unknown)}; there are {', '.join(pins.OWNERS)}")
            Store().ensure(arguments.programs or pins.OWNERS)
            return 0
        case "prune":
            for path in Store().prune():
                print(f"removed {path}")
            for name in project.prune(Builder(report=say)):
                print(f"removed {name}")
            return 0
        case "packages":
            machine.install()
            return 0
        case "prepare":
            if reason := provider.obstacle():
                print(f"no scenarios on a real cluster: {reason}")
                return 0
            # A first build takes longer than a test may.
            match provider.kind_of_cluster():
                case "local":
                    machine.install()
                    # Side by side: programs are compiled, images are mostly downloaded and copied.
                    with ThreadPoolExecutor() as pool:
                        programs = pool.submit(Store(report=say).ensure, pins.CLUSTER_PROGRAMS)
                        for image in map(project.ProjectImage, project.ROLES):
                            image.layout(Builder(report=say))
                        programs.result()
                case "kind":
                    for image in map(project.ProjectImage, project.ROLES):
                        kind.build(image.reference, image.dockerfile, image.checkout)
            return 0
        case "conform":
            return conform(Store(), arguments.manifests, arguments.crd)
        case "build-image":
            builder = Builder(report=say)
            print(builder.build(arguments.name, arguments.file, arguments.context, arguments.build_arg))
            return 0
        case "envtest":
            return envtest(arguments.arguments)
    cluster = choose(report=lambda line: print(line, flush=True))
    match arguments.command:
        case "up":
            cluster.up(shape(arguments))
            print(f"export KUBECONFIG={cluster.kubeconfig}")
        case "down":
            cluster.down()
        case "status":
            return 0 if cluster.status() else 1
        case "load-image":
            for path in arguments.path:
                cluster.load_image(path, arguments.name)
        case "images":
            own_images(cluster, arguments.roles)
        case "kubeconfig":
            print(cluster.kubeconfig)
        case "kubectl":
            program = Store().program("kubectl") if isinstance(cluster, LocalCluster) else Path("kubectl")
            line = [str(program), *command_of(arguments.arguments)]
            return subprocess.run(line, env=cluster.environment(), check=False).returncode
        case "helm":
            return helm(Store(), cluster, arguments.arguments)
        case "fake-nodes":
            labels = dict(label.partition("=")[::2] for label in arguments.label)
            fake_nodes.have(_local(cluster, "fake-nodes"), arguments.count, arguments.gpus, labels)
        case "stop":
            _local(cluster, "stop").stop(arguments.node, arguments.component)
        case "start":
            _local(cluster, "start").start(arguments.node, arguments.component)
        case "exec":
            return _local(cluster, "exec").execute(arguments.node, command_of(arguments.arguments))
    return 0


def main() -> int:
    """The entry point."""
    arguments = parser().parse_args()
    try:
        return run(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
