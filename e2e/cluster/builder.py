"""Images from Dockerfiles, without a Docker daemon and without a registry: buildah, over bases that debootstrap makes.

The result is an OCI layout in the user's cache folder, one for each image name. Only layers that changed are written to it,
and a node is then given only the layers that it lacks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import machine
from .errors import ClusterError
from .images import Folder, images
from .layout import CHECKOUT
from .process import command
from .store import cache_directory

#: The machine's certificates: behind a proxy that inspects TLS, a build needs them. They do not get into the image.
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
#: Debian release by the image that its own Python stands in for: the same minor version takes the same wheels.
BASES: Mapping[str, str] = {"python:3.13-slim-trixie": "trixie", "python:3.11-slim-bookworm": "bookworm"}
#: The official image has Python's headers, too: Triton compiles against them.
PACKAGES = "python3,python3-dev,python3-pip,python3-venv,ca-certificates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: buildah and skopeo mount their storage and leave it so. A mount would stay, and no file in it could be linked elsewhere.
_PRIVATE = ("unshare", "--mount", "--propagation=private")
#: A Dockerfile that declares this argument gets the user's own cache of uv, in which the machine's wheels already are.
UV_CACHE = "UV_CACHE_DIR"
_UV_CACHE_INSIDE = "/var/cache/uv"
#: Where a base says what it was made of.
_MADE_OF = "dev.drumline.made-of"
_WASTE = ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")


@dataclass(frozen=True)
class Builder:
    """buildah with a storage of its own.

    Attributes:
        root: Of storage and results.
        report: Told what is done and how long it took.
    """

    root: Path = field(default_factory=lambda: cache_directory().parent / "images")
    report: Callable[[str], None] = print

    def build(self, name: str, dockerfile: Path, context: Path, arguments: Sequence[str] = ()) -> Path:
        """Build a Dockerfile.

        Args:
            name: Of the image, full and with a tag: `localhost/drumline/worker:e2e`.
            dockerfile: Whose FROM names a base of ours (`BASES`) or an image that was built here.
            context: The folder that COPY sees.
            arguments: `NAME=VALUE` for ARG.

        Returns:
            An OCI layout, for `load-image`.

        Raises:
            ClusterError: A package is missing, or the build failed; the message has its output.
        """
        machine.install(machine.IMAGE_PACKAGES, self.report)
        started = time.monotonic()
        text = dockerfile.read_text()
        for base in bases(text):
            if base in BASES:
                with self.locked(base):
                    if not self._has(base):
                        self.make_base(base)
        # The build sees the machine's network, and never looks for an image elsewhere.
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--layers", "--format=oci", f"--tag={name}"]
        if CA_BUNDLE.exists():
            options.append(f"--volume={CA_BUNDLE}:{CA_BUNDLE}:ro")
        if re.search(rf"^ARG {UV_CACHE}\b", text, re.MULTILINE):
            options += [f"--volume={uv_cache()}:{_UV_CACHE_INSIDE}", f"--build-arg={UV_CACHE}={_UV_CACHE_INSIDE}"]
        options += [f"--build-arg={argument}" for argument in arguments]
        self._buildah("bud", *options, f"--file={dockerfile}", str(context))
        self.report(f"built {name} in {time.monotonic() - started:.1f} s")
        with self.locked("export"):
            return self._export(name)

    def make_base(self, name: str) -> None:
        """Make the stand-in for an official image.

        Args:
            name: One of `BASES`.
        """
        started = time.monotonic()
        suite = BASES[name]
        directory = self.root / f"rootfs-{suite}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        # dpkg need not wait for the disk after every file: what a crash leaves half done is made anew.
        command(
            "env", "DPKG_FORCE=unsafe-io", "debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, directory
        )
        for waste in _WASTE:
            shutil.rmtree(directory / waste, ignore_errors=True)
        for marker in (directory / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
            marker.unlink()  # pip may install into the system's interpreter, as it may in the official image
        for link, target in {"python": "python3", "python3": "python3", "pip": "pip3"}.items():
            (directory / "usr/local/bin" / link).symlink_to(f"/usr/bin/{target}")
        container = self._buildah("from", "scratch")
        self._buildah("copy", "--quiet", container, str(directory), "/")
        settings = ["--env", f"PATH={PATH}", "--env", "LANG=C.UTF-8", "--cmd", '["python3"]']
        settings += ["--label", f"{_MADE_OF}={made_of(name)}"]
        self._buildah("config", *settings, container)
        self._buildah("commit", "--quiet", "--rm", container, f"localhost/{name}")
        shutil.rmtree(directory)
        self.report(f"made {name} from Debian {suite} in {time.monotonic() - started:.1f} s")

    def keep(self, repository: str, count: int, stacks: int = 1) -> list[str]:
        """Remove all but the images of a repository that were built or used last.

        Args:
            repository: A name without its tag.
            count: How many stay at most.
            stacks: How many largest layers they may have between them: those decide about the space that is taken.

        Returns:
            The names of those that were removed.
        """
        with self.locked("export"):
            indexes = (self.root / "oci").glob("*/index.json")
            found = [(path.stat().st_mtime, each) for path in indexes for each in images(Folder(path.parent), "any")]
            mine = [each for _, each in sorted(found, key=lambda pair: -pair[0]) if named(each.name, repository)]
            kept: list[str] = []  # the largest layer of each that stays
            old = []
            for image in mine:
                largest = max(image.blobs, key=lambda digest: image.blobs[digest])
                if len(kept) < count and (largest in kept or len(set(kept)) < stacks):
                    kept.append(largest)
                else:
                    old.append(image.name)
            for name in old:
                self._remove(name)
            return old

    def remove(self, name: str) -> None:
        """Remove an image that was built here; its layers stay as far as others need them.

        Args:
            name: Full, with its tag.
        """
        with self.locked("export"):
            self._remove(name)

    def _remove(self, name: str) -> None:
        shutil.rmtree(self.layout(name), ignore_errors=True)
        with contextlib.suppress(ClusterError):  # it may be gone, or was never there
            self._buildah("rmi", name)

    def prune(self) -> None:
        """Remove layers that belong to no image with a name; the next build makes anew those that it needs."""
        with self.locked("export"):
            self._buildah("rmi", "--prune", "--force")

    def unpacked(self) -> dict[str, Path]:
        """The files of every layer that was built here, by the layer's digest."""
        try:
            layers = json.loads((self._storage / "root/overlay-layers/layers.json").read_text())
        except FileNotFoundError:
            return {}
        # Those of containers, such as builds that run now, have no digest.
        done = [layer for layer in layers if "diff-digest" in layer]
        folders = {layer["diff-digest"]: self._storage / "root/overlay" / layer["id"] / "diff" for layer in done}
        return {digest: folder for digest, folder in folders.items() if folder.is_dir()}

    @property
    def _storage(self) -> Path:
        return self.root / "storage"

    def layout(self, name: str) -> Path:
        """Where the OCI layout of an image is, or will be."""
        return self.root / "oci" / re.sub(r"[^\w.-]", "_", name)

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Alone among all builds on the machine that say the same."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{re.sub(r'[^a-z0-9.-]', '_', what)}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _has(self, name: str) -> bool:
        """Whether a base is here, made as we would make it now."""
        wanted = ["--filter", f"label={_MADE_OF}={made_of(name)}"]
        listed = json.loads(self._buildah("images", "--json", *wanted) or "[]") or []
        return any(f"localhost/{name}" in (image.get("names") or []) for image in listed)

    def _export(self, name: str) -> Path:
        """Bring the layout of an image up to date."""
        started = time.monotonic()
        layout = self.layout(name)
        layout.mkdir(parents=True, exist_ok=True)
        (layout / "index.json").unlink(missing_ok=True)  # its old image would stay in it
        link_siblings(layout)
        before = set(layout.glob("blobs/*/*"))
        # Not `buildah push`, which compresses all layers each time; this one skips those that are there.
        source = f"containers-storage:[overlay@{self._storage}/root+{self._storage}/run]{name}"
        options = ["--quiet", "--insecure-policy", "--dest-oci-accept-uncompressed-layers"]
        command(*_PRIVATE, "skopeo", "copy", *options, source, f"oci:{layout}:{name}")
        written = sum(path.stat().st_size for path in layout.glob("blobs/*/*") if path not in before)
        remove_unused(layout)
        self.report(f"wrote {written / 1e6:.1f} MB of its layers in {time.monotonic() - started:.1f} s")
        return layout

    def _buildah(self, *arguments: str) -> str:
        storage = [
            "--root",
            f"{self._storage}/root",
            "--runroot",
            f"{self._storage}/run",
            "--storage-driver",
            "overlay",
        ]
        return command(*_PRIVATE, "buildah", *storage, *arguments).strip()


def made_of(base: str) -> str:
    """What decides about a base that we make, as a short hash."""
    return hashlib.sha256(f"{BASES[base]} {PACKAGES} {_WASTE}".encode()).hexdigest()[:16]


def uv_cache() -> Path:
    """The user's cache of uv, where the wheels of this machine's environments are."""
    path = Path(command(CHECKOUT / "tools" / "uv", "cache", "dir").strip())
    path.mkdir(parents=True, exist_ok=True)
    return path


def bases(dockerfile: str) -> list[str]:
    """The images that a Dockerfile begins with, but for its own stages and those given by a build argument."""
    found = re.findall(r"^FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", dockerfile, re.MULTILINE | re.IGNORECASE)
    stages = {stage for _, stage in found}
    return [image for image, _ in found if image not in stages and "$" not in image]


def remove_unused(layout: Path) -> list[str]:
    """Remove the blobs of an OCI layout that no image of it needs; their digests."""
    needed = {digest for image in images(Folder(layout), "any") for digest in image.blobs}
    unused = [path for path in layout.glob("blobs/*/*") if f"{path.parent.name}:{path.name}" not in needed]
    for path in unused:
        path.unlink()
    return [f"{path.parent.name}:{path.name}" for path in unused]


def named(name: str, repository: str) -> bool:
    """Whether an image belongs to a repository, whatever its tag."""
    return name.rpartition(":")[0] == repository


def link_siblings(layout: Path) -> None:
    """Give an OCI layout the blobs of those beside it as hard links: what they share is neither written nor stored again."""
    for path in layout.parent.glob("*/blobs/*/*"):
        target = layout / path.relative_to(path.parents[2])
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
