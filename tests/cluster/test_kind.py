"""What is asked of docker, kind and kubectl, told by programs of these names that write down what they are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import kind
from e2e.cluster.__main__ import parser, run
from e2e.cluster.errors import ClusterError
from e2e.cluster.kind import KindCluster
from e2e.cluster.layout import GPU_RESOURCE, Layout, Shape
from e2e.cluster.project import ROLES, ProjectImage
from e2e.cluster.store import Store

#: Appends its name and arguments to $TOLD, its input to $TOLD.input; `kind get clusters` answers with $CLUSTERS.
PROGRAM = """\
#!/bin/sh
echo "${0##*/} $*" >>"$TOLD"
case "$*" in
"build "*) echo "attestations ${BUILDX_NO_DEFAULT_ATTESTATIONS-as usual}" >>"$TOLD"
    echo "buildkit ${DOCKER_BUILDKIT-as usual}" >>"$TOLD" ;;
"get nodes --selector="*) echo '{"items": [{"metadata": {"name": "one"}}, {"metadata": {"name": "two"}}]}' ;;
"get clusters") echo "$CLUSTERS" ;;
"get nodes --output=json") if [ "$NODES" ]; then echo "$NODES"; else echo '{"items": []}'; fi ;;
*--filename=-*) cat >>"$TOLD.input" ;;
esac
exit "${STATUS:-0}"
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("docker", "kind", "kubectl"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("CLUSTERS", "other")
    return tmp_path / "told"


@pytest.fixture
def cluster(tmp_path: Path) -> KindCluster:
    store = Store(root=tmp_path / "cache", report=lambda _: None)
    store.program("fakegpu").parent.mkdir(parents=True)
    for path in (store.program("fakegpu"), store.image("fakegpu")):
        path.touch()
    return KindCluster(Layout(tmp_path / "state"), store, lambda _: None)


def asked(told: Path, program: str) -> list[str]:
    return [line.partition(" ")[2] for line in told.read_text().splitlines() if line.startswith(f"{program} ")]


def test_a_cluster_is_made_with_our_config_and_our_kubeconfig(told: Path, cluster: KindCluster) -> None:
    cluster.up(Shape(gpus=4))
    make, load = asked(told, "kind")[1:]
    assert make == (
        f"create cluster --name=drumline --config={kind.CONFIG} --kubeconfig={cluster.kubeconfig} --wait={kind.LIMIT}"
    )
    assert load == f"load image-archive {cluster.store.image('fakegpu')} --name=drumline"
    plugin = json.loads(Path(f"{told}.input").read_text())
    assert plugin["items"][0]["spec"]["template"]["spec"]["containers"][0]["args"] == ["-count=4"]
    assert any(r".status.allocatable.nvidia\.com/gpu}=4" in line for line in asked(told, "kubectl"))


def test_a_cluster_that_is_there_is_kept(told: Path, cluster: KindCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERS", "other\ndrumline")
    cluster.up()
    assert not any(line.startswith("create") for line in asked(told, "kind"))
    assert f"export kubeconfig --name=drumline --kubeconfig={cluster.kubeconfig}" in asked(told, "kind")


def test_down_removes_no_other_cluster(told: Path, cluster: KindCluster) -> None:
    cluster.down()
    assert asked(told, "kind") == [f"delete cluster --name=drumline --kubeconfig={cluster.kubeconfig}"]


def test_another_image_of_nodes(told: Path, cluster: KindCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kind.NODE_IMAGE, "kindest/node:v1.35.0")
    cluster.up()
    assert asked(told, "kind")[1].endswith(" --image=kindest/node:v1.35.0")


def test_no_nodes_are_not_healthy(told: Path, cluster: KindCluster) -> None:
    assert not cluster.status()


def node(name: str, gpus: int = 0, ready: str = "True", **spec: Any) -> dict[str, Any]:
    status = {"conditions": [{"type": "Ready", "status": ready}], "allocatable": {GPU_RESOURCE: str(gpus)}}
    return {"metadata": {"name": name}, "spec": spec, "status": status}


CONTROL_PLANE = node("control-plane", taints=[{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}])
LOST = [{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]


@pytest.mark.parametrize(
    ("nodes", "healthy"),
    [
        ([CONTROL_PLANE, node("one", 8), node("two", 8)], True),
        ([CONTROL_PLANE, node("one", 8), node("two", 8, ready="Unknown", taints=LOST)], False),
        ([CONTROL_PLANE, node("one"), node("two")], False),
        ([CONTROL_PLANE], False),
    ],
    ids=["as it should be", "a node is lost", "no GPUs yet", "nothing takes pods"],
)
def test_a_control_plane_may_keep_pods_away(
    told: Path, cluster: KindCluster, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], healthy: bool
) -> None:
    monkeypatch.setenv("NODES", json.dumps({"items": nodes}))
    assert cluster.status() is healthy


def test_a_daemon_that_does_not_answer_is_named(
    told: Path, cluster: KindCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATUS", "1")
    with pytest.raises(ClusterError, match="CLUSTER=kind needs a Docker daemon that answers"):
        cluster.up()


def test_an_image_is_built_without_attestations_and_loaded_where_pods_run(
    told: Path, cluster: KindCluster, tmp_path: Path
) -> None:
    cluster.build_image("localhost/a:1", tmp_path / "Dockerfile", tmp_path)
    assert asked(told, "docker") == [f"build --tag=localhost/a:1 --file={tmp_path}/Dockerfile {tmp_path}"]
    assert asked(told, "attestations") == ["1"]
    assert asked(told, "buildkit") == ["1"], "Docker before 23 would not take the Dockerfiles"
    assert asked(told, "kind") == ["load docker-image localhost/a:1 --name=drumline --nodes=one,two"]


def test_a_folder_cannot_be_loaded(cluster: KindCluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="kind loads tar files"):
        cluster.load_image(tmp_path)


def test_images_are_built_before_the_tests(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "kind")
    assert run(parser().parse_args(["prepare"])) == 0
    builds = [line.split()[1] for line in asked(told, "docker") if line.startswith("build ")]
    assert builds == [f"--tag={ProjectImage(role).reference}" for role in ROLES]
