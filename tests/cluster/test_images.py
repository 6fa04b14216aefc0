"""OCI images: written, read, and sent to a node without what it has."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from e2e.cluster import images
from e2e.cluster.errors import ClusterError
from e2e.cluster.oci import write_image

NAME = "localhost/drumline/thing:1"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    binary = tmp_path / "thing"
    binary.write_bytes(b"program" * 1000)
    write_image(tmp_path / "thing.tar", NAME, binary, user="65535:65535", architecture="amd64")
    return tmp_path / "thing.tar"


@pytest.fixture
def folder(archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    return tmp_path / "layout"


def test_the_same_input_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "again.tar", NAME, tmp_path / "thing", user="65535:65535", architecture="amd64")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    assert not list(tmp_path.glob("*.draft"))


def test_an_image_is_what_the_specification_says(archive: Path) -> None:
    source = images.open_source(archive)
    (image,) = images.images(source)
    assert image.name == NAME
    for digest, size in image.blobs.items():
        content = source.read("blobs/" + digest.replace(":", "/"))
        assert "sha256:" + hashlib.sha256(content).hexdigest() == digest
        assert len(content) == size
    manifest = json.loads(source.read("blobs/" + image.digest.replace(":", "/")))
    config = json.loads(source.read("blobs/" + manifest["config"]["digest"].replace(":", "/")))
    assert config["config"] == {"Entrypoint": ["/thing"], "User": "65535:65535"}
    (layer,) = manifest["layers"]
    with tarfile.open(fileobj=io.BytesIO(source.read("blobs/" + layer["digest"].replace(":", "/")))) as tar:
        (member,) = tar
        assert (member.name, member.mode, member.size) == ("thing", 0o755, 7000)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_node_gets_only_what_it_lacks(archive: Path, folder: Path, as_folder: bool) -> None:
    source = images.open_source(folder if as_folder else archive)
    (image,) = images.images(source)
    layer = max(image.blobs, key=lambda digest: image.blobs[digest])
    everything, rest = io.BytesIO(), io.BytesIO()
    assert images.write_layout(everything, source, image, frozenset()) == sum(image.blobs.values())
    written = images.write_layout(rest, source, image, frozenset({layer}))
    assert written == sum(image.blobs.values()) - image.blobs[layer]
    rest.seek(0)
    with tarfile.open(fileobj=rest) as tar:
        found = set(tar.getnames())
    wanted = {"blobs/" + digest.replace(":", "/") for digest in image.blobs if digest != layer}
    assert found == wanted | {"oci-layout", "index.json"}


def test_what_was_sent_can_be_read_again(folder: Path, tmp_path: Path) -> None:
    source = images.open_source(folder)
    (image,) = images.images(source)
    with (tmp_path / "sent.tar").open("wb") as target:
        images.write_layout(target, source, image, frozenset())
    (again,) = images.images(images.open_source(tmp_path / "sent.tar"))
    assert again == image


def test_an_index_of_several_platforms_is_followed(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    inner = json.dumps({"schemaVersion": 2, "manifests": index["manifests"]}).encode()
    digest = hashlib.sha256(inner).hexdigest()
    (folder / "blobs/sha256" / digest).write_bytes(inner)
    entry = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": f"sha256:{digest}",
        "size": len(inner),
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (image,) = images.images(images.open_source(folder), "localhost/x:1")
    assert image.name == "localhost/x:1"
    assert len(image.blobs) == 4


def test_an_image_without_a_name_is_refused(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    del index["manifests"][0]["annotations"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ClusterError, match="has no name in its index; give one with --name"):
        images.images(images.open_source(folder))


def test_what_is_no_layout_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for path in (tmp_path, tmp_path / "empty.tar", tmp_path / "nothing"):
        with pytest.raises(ClusterError, match="is no OCI image layout"):
            images.open_source(path)
