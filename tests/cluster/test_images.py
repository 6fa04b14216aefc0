"""OCI images: written, read, and sent to a node without what it has."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from e2e.cluster import builder, images, runtime
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


def test_layers_are_chained_as_the_specification_says(folder: Path) -> None:
    source = images.open_source(folder)
    (image,) = images.images(source)
    (layer,) = images.layer_digests(source, image)
    assert images.chain([]) == []
    assert images.chain([layer]) == [layer]
    second = hashlib.sha256(f"{layer} sha256:b".encode()).hexdigest()
    third = hashlib.sha256(f"sha256:{second} sha256:c".encode()).hexdigest()
    assert images.chain([layer, "sha256:b", "sha256:c"]) == [layer, f"sha256:{second}", f"sha256:{third}"]


def test_the_name_may_be_a_reference_but_not_a_tag(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    for reference, found in (("localhost/other:2", "localhost/other:2"), ("2", "given:1")):
        index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": reference}
        (folder / "index.json").write_text(json.dumps(index))
        (image,) = images.images(images.open_source(folder), "given:1")
        assert image.name == found


def test_blobs_that_no_image_needs_are_removed(folder: Path) -> None:
    before = set(folder.glob("blobs/*/*"))
    (folder / "blobs/sha256/old").touch()
    assert builder.remove_unused(folder) == ["sha256:old"]
    assert set(folder.glob("blobs/*/*")) == before


@pytest.mark.parametrize(
    ("dockerfile", "found"),
    [
        ("FROM python:3.13-slim-trixie\n", ["python:3.13-slim-trixie"]),
        ("ARG X\nFROM --platform=linux/amd64 a AS one\nfrom b as two\nFROM one\nFROM ${X}\n", ["a", "b"]),
        ("# FROM x\nRUN echo FROM y\n", []),
    ],
)
def test_the_bases_of_a_dockerfile(dockerfile: str, found: list[str]) -> None:
    assert builder.bases(dockerfile) == found


@pytest.mark.parametrize(
    ("mount", "directory"),
    [
        ({"Type": "bind", "Source": "/s/1/fs", "Target": "", "Options": ["rw", "rbind"]}, "/s/1/fs"),
        (
            {
                "type": "overlay",
                "source": "overlay",
                "options": ["workdir=/s/2/work", "upperdir=/s/2/fs", "lowerdir=/s/1/fs"],
            },
            "/s/2/fs",
        ),
    ],
)
def test_where_a_snapshot_has_its_own_files(mount: dict[str, object], directory: str) -> None:
    assert runtime.upper_directory(mount) == directory
