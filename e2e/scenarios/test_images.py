"""Images get into the nodes, and of a changed image only what changed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import runtime
from e2e.cluster.images import blob_path
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.probe import Kubectl, ask, pod_spec

NAME = "localhost/drumline/layered:e2e"
Layered = Callable[[str], Path]


@pytest.fixture
def local(cluster: Cluster) -> LocalCluster:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("how images get into other clusters is not ours to test")
    return cluster


@pytest.fixture
def layered(local: LocalCluster, tmp_path: Path) -> Layered:
    """Puts a layer with one file, named in the argument, upon the probe's image; the layout's place stays the same."""
    place = tmp_path / "layout"
    local.store.ensure(["probe"])
    with tarfile.open(local.store.image("probe")) as tar:
        tar.extractall(place, filter="data")
    first = json.loads((place / "index.json").read_text())["manifests"][0]["digest"]
    manifest = json.loads((place / blob_path(first)).read_text())
    config = json.loads((place / blob_path(manifest["config"]["digest"])).read_text())

    def blob(content: bytes) -> dict[str, Any]:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        (place / blob_path(digest)).write_bytes(content)
        return {"digest": digest, "size": len(content)}

    def make(file: str) -> Path:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(file))
        top = {"mediaType": "application/vnd.oci.image.layer.v1.tar"} | blob(layer.getvalue())
        layers = [*manifest["layers"], top]
        diff_ids = [layer["digest"] for layer in layers]
        inside = config | {"rootfs": {"type": "layers", "diff_ids": diff_ids}}
        described = manifest["config"] | blob(json.dumps(inside).encode())
        whole = blob(json.dumps(manifest | {"config": described, "layers": layers}).encode())
        entry = {"mediaType": manifest["mediaType"], "annotations": {"io.containerd.image.name": NAME}} | whole
        (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        return place

    return make


def files_in_new_pod(kubectl: Kubectl, namespace: str, name: str) -> list[str]:
    """What lies in the root of a pod that runs the image."""
    spec = pod_spec(NAME, 0) | {"topologySpreadConstraints": []}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    kubectl("create", "--filename=-", input=json.dumps(item))
    kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--namespace={namespace}", "--timeout=180s")
    return ask(kubectl, item, "/files?of=/")


def test_of_a_changed_image_only_the_change_is_copied(
    local: LocalCluster, kubectl: Kubectl, namespace: str, layered: Layered
) -> None:
    runtime.load(local.nodes, layered("first"))
    assert "first" in files_in_new_pod(kubectl, namespace, "first")
    copied = runtime.load(local.nodes, layered("second"))
    assert all(0 < size < 100_000 for size in copied.values()), copied
    found = files_in_new_pod(kubectl, namespace, "second")
    assert "second" in found
    assert "first" not in found
    assert set(runtime.load(local.nodes, layered("second")).values()) == {0}


def test_files_that_are_unpacked_already_are_linked(
    local: LocalCluster, kubectl: Kubectl, namespace: str, layered: Layered, tmp_path: Path
) -> None:
    if tmp_path.stat().st_dev != local.layout.state.stat().st_dev:
        pytest.skip(f"{tmp_path} and {local.layout.state} are on different disks; set TMPDIR")
    place = layered("linked")
    digest = json.loads((place / "index.json").read_text())["manifests"][0]["digest"]
    probe_layer, top_layer = (part["digest"] for part in json.loads((place / blob_path(digest)).read_text())["layers"])
    unpacked = {}
    for layer in (probe_layer, top_layer):
        unpacked[layer] = tmp_path / "unpacked" / layer.rpartition(":")[2]
        with tarfile.open(place / blob_path(layer)) as tar:
            tar.extractall(unpacked[layer], filter="data")
    runtime.load(local.nodes, place, unpacked=unpacked)
    # Once here, once in each node; the probe's own layer is in the nodes already if another test has brought it.
    assert (unpacked[top_layer] / "linked").stat().st_nlink == 1 + len(local.nodes)
    assert "linked" in files_in_new_pod(kubectl, namespace, "linked")


def test_a_layout_that_is_not_whole_is_refused(local: LocalCluster, layered: Layered) -> None:
    place = layered("broken")
    digest = json.loads((place / "index.json").read_text())["manifests"][0]["digest"]
    layer = json.loads((place / blob_path(digest)).read_text())["layers"][-1]["digest"]
    (place / blob_path(layer)).write_bytes(b"x" * (place / blob_path(layer)).stat().st_size)
    with pytest.raises(Exception, match=f"(?s){NAME} could not be loaded into node-.*digest"):
        runtime.load(local.nodes, place)
