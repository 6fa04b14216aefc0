"""OCI image layouts, in folders and tar files: reading them, and passing on a part of one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import ClusterError

NAME = "io.containerd.image.name"
REFERENCE = "org.opencontainers.image.ref.name"
_INDEX_TYPES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}


class Source(Protocol):
    """A place with an OCI image layout."""

    def read(self, name: str) -> bytes:
        """A small file of it."""

    def open(self, name: str) -> IO[bytes]:
        """A stream that begins with a file of it."""

    def size(self, name: str) -> int:
        """Bytes of a file; raises KeyError where there is none."""


class Folder:
    """An OCI layout in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, digest: str) -> Path:
        """The file of a blob."""
        return self._directory / blob_path(digest)

    def read(self, name: str) -> bytes:
        """A small file."""
        return (self._directory / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """A file as a stream."""
        return (self._directory / name).open("rb")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self._directory / name
        if not path.exists():
            raise KeyError(name)
        return path.stat().st_size


class Archive:
    """An OCI layout in a tar file without compression."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with tarfile.open(path, "r:") as tar:
            self._members = {member.name.removeprefix("./"): member for member in tar if member.isfile()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """A small file."""
        with self.open(name) as file:
            return file.read(self.size(name))

    def open(self, name: str) -> IO[bytes]:
        """A file as a stream; what follows it in the archive comes after it."""
        file = self._path.open("rb")
        file.seek(self._members[name].offset_data)
        return file

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._members[name].size


@dataclass(frozen=True)
class Image:
    """One image of a layout.

    Attributes:
        name: Full, with its tag.
        entry: Its line in the index.
        blobs: Size by digest of all that belongs to it, the manifest first.
    """

    name: str
    entry: dict[str, Any]
    blobs: dict[str, int]

    @property
    def digest(self) -> str:
        """What containerd keeps under the name."""
        return str(self.entry["digest"])


def blob_path(digest: str) -> str:
    """Where a layout has a blob."""
    return "blobs/" + digest.replace(":", "/")


def images(source: Source, name: str = "") -> list[Image]:
    """The images of a layout.

    Args:
        source: The layout.
        name: What to call its image, if it has one and that has no full name of its own.

    Raises:
        ClusterError: An image has no name.
    """
    found = []
    for entry in json.loads(source.read("index.json"))["manifests"]:
        annotations = entry.get("annotations", {})
        reference = annotations.get(REFERENCE, "")  # often a tag alone
        full = annotations.get(NAME, "") or (reference if "/" in reference else "") or name
        if not full:
            raise ClusterError(f"the image {entry['digest']} has no name in its index; give one with --name")
        found.append(Image(full, entry, dict(_blobs(source, entry))))
    return found


def _blobs(source: Source, entry: dict[str, Any]) -> Iterator[tuple[str, int]]:
    yield entry["digest"], entry["size"]
    document = json.loads(source.read(blob_path(entry["digest"])))
    if entry.get("mediaType") in _INDEX_TYPES or "manifests" in document:
        for child in document["manifests"]:
            yield from _blobs(source, child)
        return
    for part in (document["config"], *document["layers"]):
        yield part["digest"], part["size"]


def write_layout(target: IO[bytes], source: Source, image: Image, present: frozenset[str]) -> int:
    """Write an OCI archive of an image without the blobs that are present already.

    Args:
        target: A stream.
        source: Where the image is.
        image: One of `images(source)`.
        present: Digests to leave out.

    Returns:
        Bytes of the blobs that were written.
    """

    def add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
        member = tarfile.TarInfo(name)
        member.size = size
        tar.addfile(member, content)

    entry = image.entry | {"annotations": {NAME: image.name}}
    documents = {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": {"schemaVersion": 2, "manifests": [entry]},
    }
    written = 0
    with tarfile.open(fileobj=target, mode="w|", bufsize=1 << 20) as tar:
        for name, value in documents.items():
            content = json.dumps(value).encode()
            add(tar, name, io.BytesIO(content), len(content))
        for digest, size in image.blobs.items():
            if digest not in present:
                with source.open(blob_path(digest)) as content_file:
                    add(tar, blob_path(digest), content_file, size)
                written += size
    return written


def layer_digests(source: Source, image: Image) -> list[str]:
    """The digests of an image's layers without compression, the lowest first; empty for several platforms."""
    manifest = json.loads(source.read(blob_path(image.digest)))
    if "config" not in manifest:
        return []
    found: list[str] = json.loads(source.read(blob_path(manifest["config"]["digest"])))["rootfs"]["diff_ids"]
    return found


def chain(layers: Sequence[str]) -> list[str]:
    """The name of each layer together with all below it, as the OCI specification makes it."""
    names: list[str] = []
    for layer in layers:
        above = hashlib.sha256(f"{names[-1]} {layer}".encode()).hexdigest() if names else ""
        names.append(f"sha256:{above}" if above else layer)
    return names


def open_source(path: Path) -> Source:
    """An OCI layout: a directory, or a tar file.

    Raises:
        ClusterError: It is neither.
    """
    if (path / "index.json").exists():
        return Folder(path)
    if path.is_file() and tarfile.is_tarfile(path):
        archive = Archive(path)
        if "index.json" in archive:
            return archive
    raise ClusterError(
        f"{path} is no OCI image layout (a directory or tar file with index.json); "
        "`buildah push`, `skopeo copy` and `docker buildx build --output type=oci` write one"
    )
