"""Images in the nodes' containerd: what is there, and bringing in what is not, in the quickest way.

- A node is given only what it lacks: of a changed image that is the layers that changed.
- Where it lies on the same disk, nothing is copied: a layer's blob is linked into the node's content store, and its files,
  if buildah has them unpacked, into a snapshot. Both are only read from then on: a container's own changes are in a layer
  above, and removal unlinks. So 5 GB of torch take seconds, and no space, in however many nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .components import CONTAINERD_SOCKET
from .errors import ClusterError
from .images import Folder, Image, Source, chain, images, layer_digests, open_source, write_layout
from .process import command
from .sandbox import NodeSandbox

_ROOT = "/var/lib/containerd"
_CONTENT = "io.containerd.content.v1.content/blobs"


class Runtime:
    """containerd of one node."""

    def __init__(self, box: NodeSandbox) -> None:
        self._box = box
        self._directory = box.layout.containerd / box.name

    def _line(self, *arguments: str) -> list[str]:
        return ["ctr", f"--address={CONTAINERD_SOCKET}", "--namespace=k8s.io", *arguments]

    def _ctr(self, *arguments: str) -> str:
        return self._box.command(*self._line(*arguments))

    def answers(self) -> bool:
        """Whether it does."""
        if not self._box.path(CONTAINERD_SOCKET).exists():
            return False
        try:
            self._ctr("version")
        except ClusterError:
            return False
        return True

    def names(self) -> dict[str, str]:
        """Digest by name of the images that are there."""
        lines = self._ctr("images", "list").splitlines()[1:]
        return {fields[0]: fields[2] for fields in map(str.split, lines)}

    def load(self, source: Source, image: Image, unpacked: Mapping[str, Path]) -> int:
        """Bring in what the node lacks of an image.

        Args:
            source: Where it is.
            image: One of `images(source)`.
            unpacked: Folders with the files of a layer, by its digest without compression.

        Returns:
            Bytes that had to be copied.
        """
        if self.names().get(image.name) == image.digest:
            return 0
        self._link_layers(chain(layers := layer_digests(source, image)), layers, unpacked)
        present = frozenset(self._ctr("content", "list", "--quiet").split())
        if isinstance(source, Folder):
            present |= self._link_blobs(source, image, present)
        return self._import(source, image, present)

    def _import(self, source: Source, image: Image, present: frozenset[str]) -> int:
        line = [*self._box.enter(*self._box.NAMESPACES), *self._line("images", "import", "-")]
        written = 0
        with subprocess.Popen(
            line, env=self._box.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin
            assert process.stderr
            try:
                written = write_layout(process.stdin, source, image, present)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended, and says why
            words = process.stderr.read().decode(errors="replace").strip()
        if process.returncode:
            raise ClusterError(f"{image.name} could not be loaded into {self._box.name}: {words}")
        return written

    def _link_blobs(self, source: Folder, image: Image, present: frozenset[str]) -> set[str]:
        """Link layers into the content store and tell containerd of them; the digests for which that went well."""
        linked = set()
        documents = {image.digest}  # containerd labels these when it imports them
        for digest, size in image.blobs.items():
            path = source.path(digest)
            if digest in present or digest in documents or size < 1 << 20 or not self._same_disk(path):
                continue
            target = self._directory / _CONTENT / digest.replace(":", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(path, target)
            # It finds the file of that digest, and reads nothing.
            options = [f"--expected-size={size}", f"--expected-digest={digest}", f"link-{digest}"]
            line = [*self._box.enter(*self._box.NAMESPACES), *self._line("content", "ingest", *options)]
            with path.open("rb") as content:
                result = subprocess.run(
                    line, env=self._box.environment, stdin=content, capture_output=True, check=False
                )
            if result.returncode == 0:
                linked.add(digest)
        return linked

    def _link_layers(self, names: Sequence[str], layers: Sequence[str], unpacked: Mapping[str, Path]) -> None:
        """Make the snapshots of as many layers as there are files of, from the lowest on."""
        there = {line.split()[0] for line in self._ctr("snapshots", "list").splitlines()[1:]} if names else set()
        below = ""
        for name, layer in zip(names, layers, strict=True):
            if name not in there:
                files = unpacked.get(layer)
                if not files or not self._same_disk(files) or not self._link_files(files, name, below):
                    return
            below = name

    def _link_files(self, files: Path, name: str, below: str) -> bool:
        """Make one snapshot; False where the files cannot be linked, and the layer has to be unpacked."""
        key = f"link-{name}"
        mounts = json.loads(self._ctr("snapshots", "prepare", "--mounts", key, *([below] if below else [])))
        inside = upper_directory(mounts[0])
        try:
            command("cp", "--archive", "--link", f"{files}/.", self._directory / Path(inside).relative_to(_ROOT))
        except ClusterError:
            self._ctr("snapshots", "remove", key)
            return False
        self._ctr("snapshots", "commit", name, key)
        return True

    def _same_disk(self, path: Path) -> bool:
        return path.stat().st_dev == self._directory.stat().st_dev


def upper_directory(mount: Mapping[str, object]) -> str:
    """Where a snapshot that is being prepared has its own files.

    Args:
        mount: As containerd describes it: a bind mount for a lowest layer, else an overlay.
    """
    found = {key.lower(): value for key, value in mount.items()}
    options = found.get("options") or []
    assert isinstance(options, list)
    for option in options:
        if str(option).startswith("upperdir="):
            return str(option).partition("=")[2]
    return str(found["source"])


def load(
    boxes: Sequence[NodeSandbox], path: Path, name: str = "", unpacked: Mapping[str, Path] | None = None
) -> dict[str, int]:
    """Load the images of a layout into all nodes at once.

    Args:
        boxes: The nodes.
        path: A directory or a tar file.
        name: What to call the image if it has no full name.
        unpacked: Folders with the files of a layer, by its digest without compression.

    Returns:
        Bytes that had to be copied, by node.
    """
    source = open_source(path)
    found = images(source, name)

    def into(box: NodeSandbox) -> int:
        return sum(Runtime(box).load(source, image, unpacked or {}) for image in found)

    with ThreadPoolExecutor() as pool:
        return dict(zip((box.name for box in boxes), pool.map(into, boxes), strict=True))
