"""The command line, the choice of a cluster, and what is said where there can be none."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.cluster import dns, envtest, machine, provider
from e2e.cluster.__main__ import command_of, parser, shape
from e2e.cluster.current import CurrentCluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.kind import KindCluster
from e2e.cluster.layout import CHECKOUT, Layout, Shape
from e2e.cluster.local import LocalCluster
from e2e.cluster.nodes import gpus_of, is_usable, state
from e2e.cluster.store import Store


def asked(*arguments: str) -> Shape | None:
    return shape(parser().parse_args(["up", *arguments]))


def test_no_options_mean_what_runs_already() -> None:
    assert asked() is None
    assert asked("--gpus", "0") == Shape(gpus=0)
    assert asked("--nodes=3", "--label=node-3:a=b=c", "--label=node-3:d=") == Shape(
        nodes=3, labels={"node-3": {"a": "b=c", "d": ""}}
    )


@pytest.mark.parametrize(
    "words", ["--label=node-3:a=b", "--label=node-1:a", "--label=a=b", "--nodes=0", "--nodes=10", "--gpus=-1"]
)
def test_an_option_that_makes_no_sense_is_named(words: str) -> None:
    with pytest.raises(ClusterError, match=words.partition("=")[0]):
        asked(words)


def test_what_follows_two_dashes() -> None:
    assert command_of(["--", "ls", "--", "-l"]) == ["ls", "--", "-l"]
    assert command_of(["ls"]) == ["ls"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, LocalCluster),
        ("", LocalCluster),
        ("local", LocalCluster),
        ("kind", KindCluster),
        ("current", CurrentCluster),
    ],
)
def test_the_environment_chooses_the_cluster(
    monkeypatch: pytest.MonkeyPatch, value: str | None, kind: type[object]
) -> None:
    monkeypatch.delenv("CLUSTER", raising=False)
    if value is not None:
        monkeypatch.setenv("CLUSTER", value)
    assert type(provider.choose()) is kind


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(ClusterError, match="CLUSTER=minikube: must be local, kind or current"):
        provider.kind_of_cluster({"CLUSTER": "minikube"})


@pytest.mark.parametrize("cluster", ["kind", "current"])
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, cluster: str) -> None:
    monkeypatch.setenv("CLUSTER", cluster)
    monkeypatch.setenv("PATH", "")
    assert f"CLUSTER={cluster} needs `" in provider.obstacle()
    with pytest.raises(ClusterError, match=f"CLUSTER={cluster} needs"):
        provider.choose().up()


def test_missing_packages_are_named_where_they_cannot_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match="install the packages iproute2 mount nftables runc util-linux"):
        machine.install()
    machine.install({})


@pytest.mark.linux
def test_users_other_than_root_are_told_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match=r"needs root.*CLUSTER=kind.*CLUSTER=current"):
        machine.check()


def test_a_foreign_cluster_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/a:{tmp_path}/b")
    said: list[str] = []
    cluster = CurrentCluster(report=said.append)
    assert cluster.kubeconfig == tmp_path / "a"
    cluster.down()
    assert said == ["CLUSTER=current: nothing was made, so nothing is removed"]
    with pytest.raises(ClusterError, match=r"push x\.tar to a registry"):
        cluster.load_image(Path("x.tar"))


def test_assets_of_kubebuilder_are_honoured(tmp_path: Path) -> None:
    store = Store(root=tmp_path / "cache")
    with pytest.raises(ClusterError, match=r"KUBEBUILDER_ASSETS=.* has no etcd and no kube-apiserver"):
        envtest.programs(store, {"KUBEBUILDER_ASSETS": str(tmp_path)})
    for name in ("etcd", "kube-apiserver"):
        (tmp_path / name).touch(mode=0o755)
    found = envtest.programs(store, {"KUBEBUILDER_ASSETS": str(tmp_path)})
    assert found == {"etcd": tmp_path / "etcd", "kube-apiserver": tmp_path / "kube-apiserver"}


def test_status_and_down_without_a_cluster(tmp_path: Path) -> None:
    said: list[str] = []
    cluster = LocalCluster(Layout(tmp_path / "none"), Store(root=tmp_path), said.append)
    assert not cluster.status()
    assert said == ["no cluster runs here; start one with `make cluster-up`"]
    cluster.down()
    assert not (tmp_path / "none").exists()
    with pytest.raises(ClusterError, match="node-1 does not run"):
        cluster.execute("node-1", ["true"])
    with pytest.raises(ClusterError, match="there is no node x; there are node-1, node-2"):
        cluster.box("x")
    with pytest.raises(ClusterError, match="node-2 has no etcd"):
        cluster.stop("node-2", "etcd")


def test_down_keeps_what_is_not_the_clusters(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ClusterError, match=r"notes is not the cluster's"):
        LocalCluster(Layout(tmp_path), Store(root=tmp_path), print).down()
    assert (tmp_path / "notes").read_text() == "mine"


def test_errors_are_short() -> None:
    line = [sys.executable, "-m", "e2e.cluster", "build", "nothing"]
    result = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no nothing; there are kube-apiserver, ")
    assert len(result.stderr.splitlines()) == 1


def node(*, ready: str = "True", reason: str = "KubeletReady", **spec: object) -> dict[str, object]:
    condition = {"type": "Ready", "status": ready, "reason": reason, "message": "it is silent"}
    status = {"conditions": [condition], "allocatable": {"nvidia.com/gpu": "8"}}
    return {"spec": spec, "status": status}


def test_a_usable_node_is_ready_and_has_no_taints() -> None:
    assert is_usable(node())
    assert not is_usable(node(ready="Unknown"))
    taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}
    assert not is_usable(node(taints=[taint]))
    assert [state(node()), state(node(taints=[taint]))] == [
        "Ready",
        "Ready, tainted node.kubernetes.io/not-ready:NoExecute",
    ]
    assert state(node(ready="Unknown", reason="NodeStatusUnknown")) == "NotReady (NodeStatusUnknown: it is silent)"
    assert gpus_of(node()) == 8
    assert gpus_of({"status": {}}) == 0


def reply(question: bytes, *, code: int = 0, addresses: int = 1) -> bytes:
    head = question[:2] + bytes([0x81, 0x80 | code]) + struct.pack(">HHHH", 1, addresses, 0, 0)
    record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 5, 4) + bytes([10, 99, 128, 1])
    return head + question[12:] + record * addresses


def test_dns_answers_are_understood() -> None:
    question = dns.query("a.bc.", 7)
    assert question[12:] == b"\x01a\x02bc\x00\x00\x01\x00\x01"
    assert dns.address(reply(question), 7) == "10.99.128.1"
    assert dns.address(reply(question), 8) is None
    assert dns.address(reply(question, code=3, addresses=0), 7) is None
    assert dns.address(reply(question, addresses=0), 7) is None
    assert dns.address(b"", 7) is None
