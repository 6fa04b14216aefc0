"""Images in the nodes' containerd: what is there, and bringing in what is not.

A node is given only the layers that it lacks, whatever the size of the image.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .components import CONTAINERD_SOCKET
from .errors import ClusterError
from .sandbox import NodeSandbox

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


def _path(digest: str) -> str:
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
    document = json.loads(source.read(_path(entry["digest"])))
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
                with source.open(_path(digest)) as content_file:
                    add(tar, _path(digest), content_file, size)
                written += size
    return written


class Runtime:
    """containerd of one node."""

    def __init__(self, box: NodeSandbox) -> None:
        self._box = box

    def _line(self, *arguments: str) -> list[str]:
        return ["ctr", f"--address={CONTAINERD_SOCKET}", "--namespace=k8s.io", *arguments]

    def answers(self) -> bool:
        """Whether it does."""
        if not self._box.path(CONTAINERD_SOCKET).exists():
            return False
        try:
            self._box.command(*self._line("version"))
        except ClusterError:
            return False
        return True

    def names(self) -> dict[str, str]:
        """Digest by name of the images that are there."""
        lines = self._box.command(*self._line("images", "list")).splitlines()[1:]
        return {fields[0]: fields[2] for fields in map(str.split, lines)}

    def load(self, source: Source, image: Image) -> int:
        """Bring in what the node lacks of an image; the bytes that were needed."""
        if self.names().get(image.name) == image.digest:
            return 0
        present = frozenset(self._box.command(*self._line("content", "list", "--quiet")).split())
        line = [*self._box.enter(*self._box.NAMESPACES), *self._line("images", "import", "-")]
        with subprocess.Popen(
            line, env=self._box.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin
            assert process.stderr
            written = 0
            try:
                written = write_layout(process.stdin, source, image, present)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended, and says why
            words = process.stderr.read().decode(errors="replace").strip()
        if process.returncode:
            raise ClusterError(f"{image.name} could not be loaded into {self._box.name}: {words}")
        return written


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


def load(boxes: Sequence[NodeSandbox], path: Path, name: str = "") -> dict[str, int]:
    """Load the images of a layout into all nodes at once.

    Args:
        boxes: The nodes.
        path: A directory or a tar file.
        name: What to call the image if it has no full name.

    Returns:
        Bytes that had to be brought in, by node.
    """
    source = open_source(path)
    found = images(source, name)

    def into(box: NodeSandbox) -> int:
        return sum(Runtime(box).load(source, image) for image in found)

    with ThreadPoolExecutor() as pool:
        return dict(zip((box.name for box in boxes), pool.map(into, boxes), strict=True))
