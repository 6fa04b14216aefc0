"""Images from Dockerfiles: built without a registry, written and linked layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.cluster import machine, runtime
from e2e.cluster.builder import Builder
from e2e.cluster.errors import ClusterError
from e2e.cluster.images import Folder, images, layer_digests
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.conftest import impossible
from e2e.probe import Kubectl, ask, pod_spec

NAME = "localhost/drumline/scratch:e2e"
DOCKERFILE = """\
FROM scratch
ARG GREETING=none
COPY probe /probe
COPY data /data
LABEL greeting=${GREETING}
ENTRYPOINT ["/probe"]
"""


@pytest.fixture
def context(tmp_path: Path, cluster: Cluster) -> Path:
    """A folder with the probe, a Dockerfile, and a file that a test may change."""
    if not isinstance(cluster, LocalCluster):
        pytest.skip("other clusters get their images from Docker")
    folder = tmp_path / "context"
    (folder / "data").mkdir(parents=True)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    cluster.store.ensure(["probe"])
    (folder / "probe").write_bytes(cluster.store.program("probe").read_bytes())
    (folder / "probe").chmod(0o755)
    return folder


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """With a storage of the test's own."""
    if reason := machine.obstacle():
        impossible(reason)
    return Builder(root=tmp_path / "images", report=lambda _: None)


def build(builder: Builder, context: Path, *arguments: str) -> Path:
    return builder.build(NAME, context / "Dockerfile", context, arguments)


def blobs(layout: Path) -> dict[str, int]:
    """Time of change by digest of the files in a layout."""
    return {path.name: path.stat().st_mtime_ns for path in layout.glob("blobs/*/*")}


def test_a_change_writes_its_own_layer_and_no_other(builder: Builder, context: Path) -> None:
    (context / "data" / "one").touch()
    layout = build(builder, context)
    before = blobs(layout)
    (image,) = images(Folder(layout))
    probe = all_layers(layout)[0]
    assert image.name == NAME

    (context / "data" / "two").touch()
    assert build(builder, context) == layout
    after = blobs(layout)
    (image,) = images(Folder(layout))
    assert {f"sha256:{name}" for name in after} == set(image.blobs)  # what the old image alone had is gone
    assert after[probe.rpartition(":")[2]] == before[probe.rpartition(":")[2]]
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(builder.root) in line]


def test_what_was_built_runs_and_took_no_copy(
    builder: Builder, context: Path, cluster: LocalCluster, kubectl: Kubectl, namespace: str
) -> None:
    (context / "data" / "hello").touch()
    layout = build(builder, context, "GREETING=hi")
    unpacked = builder.unpacked()
    (image,) = images(Folder(layout))
    assert set(layer_digests(Folder(layout), image)) <= set(unpacked)
    copied = runtime.load(cluster.nodes, layout, unpacked=unpacked)
    if layout.stat().st_dev == cluster.layout.state.stat().st_dev:
        assert max(copied.values()) < 100_000
    item = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "built", "namespace": namespace},
        "spec": pod_spec(NAME, 0),
    }
    kubectl("create", "--filename=-", input=json.dumps(item))
    kubectl("wait", "--for=condition=Ready", "pod/built", f"--namespace={namespace}", "--timeout=180s")
    assert ask(kubectl, item, "/files?of=/data") == ["hello"]


def test_only_the_newest_images_stay(builder: Builder, context: Path) -> None:
    places = {}
    for tag in ("one", "two", "three"):
        (context / "data" / tag).touch()
        places[tag] = builder.build(f"localhost/drumline/scratch:{tag}", context / "Dockerfile", context)
    other = builder.build("localhost/drumline/scratch-other:one", context / "Dockerfile", context)
    before = set(builder.unpacked())

    assert builder.keep("localhost/drumline/scratch", 1) == [
        f"localhost/drumline/scratch:{tag}" for tag in ("two", "one")
    ]
    assert [tag for tag, place in places.items() if place.exists()] == ["three"]
    assert other.exists()
    builder.prune()
    # The data of the first two builds is gone, and all of the images that stayed is there.
    layers = {digest for place in (places["three"], other) for digest in all_layers(place)}
    assert layers == set(builder.unpacked()) < before


def all_layers(layout: Path) -> list[str]:
    (image,) = images(Folder(layout))
    return layer_digests(Folder(layout), image)


def test_a_layer_that_another_image_has_is_not_written_again(builder: Builder, context: Path) -> None:
    (context / "data" / "one").touch()
    first = build(builder, context)
    second = builder.build("localhost/drumline/scratch:again", context / "Dockerfile", context)
    assert second != first
    probe = all_layers(first)[0].rpartition(":")[2]
    assert (second / "blobs/sha256" / probe).samefile(first / "blobs/sha256" / probe)
    builder.remove(NAME)
    assert not first.exists()
    assert set(all_layers(second)) <= {f"sha256:{path.name}" for path in second.glob("blobs/sha256/*")}


def test_a_failed_build_says_why(builder: Builder, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    with pytest.raises(ClusterError, match="nothing"):
        build(builder, context)


def test_a_base_that_is_not_here_is_not_looked_for_elsewhere(builder: Builder, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM localhost/drumline/none:1\n")
    with pytest.raises(ClusterError, match=r"localhost/drumline/none:1.*image not known"):
        build(builder, context)
