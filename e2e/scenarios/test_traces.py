"""A cluster of its own, next to any other: `up` starts it whole, and `down` leaves the machine as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster import cgroups, machine
from e2e.cluster.errors import ClusterError
from e2e.cluster.layout import Layout, Shape
from e2e.cluster.local import LocalCluster
from e2e.cluster.process import command
from e2e.conftest import impossible


@pytest.fixture
def said() -> list[str]:
    """What a cluster of the test's own has said."""
    return []


@pytest.fixture
def own(tmp_path: Path, said: list[str]) -> Iterator[LocalCluster]:
    """A cluster in a directory of the test's own."""
    if reason := machine.obstacle():
        impossible(reason)
    made = LocalCluster(Layout(tmp_path / "state"), report=said.append)
    yield made
    made.down()


def namespaces() -> set[str]:
    """All namespaces that a process lives in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("net", "mnt", "pid"):
            try:
                found.add(os.readlink(process / "ns" / name))
            except OSError:
                continue
    return found


def traces(state: Path) -> dict[str, object]:
    """What of a cluster can be seen on the machine."""
    links = {line.split()[0].partition("@")[0] for line in command("ip", "-brief", "link").splitlines()}
    return {
        "links": {link for link in links if link.startswith("drumline")},
        "routes": {line for line in command("ip", "route", "show", "table", "all").splitlines() if "drumline" in line},
        "cgroups": {str(path) for path in [*cgroups.ROOT.glob("drumline-*"), *cgroups.ROOT.glob("*/drumline-*")]},
        "mounts": {line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line},
        "rules": command("nft", "list", "ruleset"),
        "state": state.exists(),
    }


def sysctls() -> dict[str, str]:
    """Settings of the whole machine that a kubelet or kube-proxy would change."""
    names = ("vm/overcommit_memory", "kernel/panic", "kernel/keys/root_maxkeys", "net/ipv4/ip_forward")
    return {name: (Path("/proc/sys") / name).read_text() for name in names}


def test_up_starts_all_and_down_leaves_nothing(own: LocalCluster, said: list[str]) -> None:
    state = own.layout.state
    own.store.ensure(["kubelet"])
    before, settings, spaces = traces(state), sysctls(), namespaces()

    own.up(Shape(gpus=3))
    assert said[-1].endswith(" s  DNS answers"), "it tells how long it took"
    assert own.status(), "\n".join(said)
    during = traces(state)
    assert {name for name in before if before[name] != during[name]} == {"links", "routes", "cgroups", "state"}
    inside = namespaces() - spaces
    assert len(inside) > 6  # net and mnt and pid of two nodes, the network's own, pods

    def late(words: str) -> None:
        """Taint a node as its controller does for what it has seen before: late, and until it looks again."""
        said.append(words)
        if words.endswith("DNS answers"):
            own.kubectl("taint", "node", "node-2", "node.kubernetes.io/not-ready:NoExecute")

    LocalCluster(own.layout, report=late).up()  # of what runs: nothing happens, but for that
    assert own.status(), "\n".join(said)
    with pytest.raises(ClusterError, match="a cluster with other options runs here"):
        own.up(Shape(gpus=4))
    allocatable = own.kubectl("get", "nodes", "--output=jsonpath={.items[*].status.allocatable.nvidia\\.com/gpu}")
    assert allocatable.split() == ["3", "3"]

    own.down()
    assert traces(state) == before
    assert sysctls() == settings
    assert not namespaces() & inside


def test_up_takes_over_from_one_that_was_killed(own: LocalCluster, said: list[str]) -> None:
    own.up()
    records = sorted(path for box in own.nodes for path in box.directory.glob("kube*.pid"))
    before = {path: path.read_text() for path in records}
    assert len(before) == 7
    for path in records:
        path.unlink()  # as if it had been killed after it had started them, and before it wrote that down
    own.up()
    assert {path: path.read_text() for path in records} == before
    assert own.status(), "\n".join(said)


def test_down_does_not_need_a_whole_cluster(own: LocalCluster) -> None:
    state = own.layout.state
    before = traces(state)
    own.up()
    own.stop("node-1", "etcd")
    own.nodes[1].stop()
    assert not own.status()
    own.down()
    assert traces(state) == before
