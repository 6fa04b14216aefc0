"""The images of the project: built from the Dockerfiles when something in them has changed, and brought into a cluster.

An image's tag is a hash of all that goes into it. So a checkout finds what another one has built, a node never runs an old
image, and nobody has to remember to build.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .builder import BASES, Builder, bases, made_of
from .errors import ClusterError
from .images import Folder, images
from .kind import KindCluster
from .layout import CHECKOUT
from .local import LocalCluster
from .pins import REGISTRY
from .provider import Cluster

Role = Literal["worker", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
#: Images kept for each role, because other checkouts use theirs: such that share their largest layer take no space.
KEPT = 8
#: Of different largest layers, at 13 GB for torch.
STACKS = 2
#: Of all files in a build: any time will do, as long as zip files can express it.
_TIME = 1_577_836_800


@dataclass(frozen=True)
class ProjectImage:
    """One of the images, as the checkout would make it now.

    Attributes:
        role: `worker` or `operator`.
        checkout: Where its Dockerfile and its files are.
    """

    role: Role
    checkout: Path = CHECKOUT

    @property
    def dockerfile(self) -> Path:
        """What it is built from."""
        return self.checkout / f"Dockerfile.{self.role}"

    @property
    def reference(self) -> str:
        """Its full name; the tag changes with its content."""
        return f"{REGISTRY}/{self.role}:{self.key}"

    @property
    def key(self) -> str:
        """A hash of the Dockerfile, the files that it copies, the bases and the kind of machine."""
        text = self.dockerfile.read_text()
        made = [f"{base} {made_of(base)}" for base in bases(text) if base in BASES]
        digest = hashlib.sha256("\n".join([platform.machine(), *made, text]).encode())
        for path in self.sources():
            content = path.read_bytes()
            digest.update(f"\n{path.relative_to(self.checkout)} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()[:16]

    def sources(self) -> list[Path]:
        """The files that the Dockerfile copies from the checkout, sorted."""
        return sorted({file for name in copied(self.dockerfile.read_text()) for file in _files(self.checkout / name)})

    def layout(self, builder: Builder) -> Path:
        """Its OCI layout in the user's cache, built if it is not there.

        Raises:
            ClusterError: The build failed; the message has its output.
        """
        builder.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=builder.root, prefix="context-") as directory:
            # Of a copy, in which nothing changes between the hash and the end of the build.
            image = self._copy(Path(directory))
            path = builder.layout(image.reference)
            with builder.locked(f"{self.role} image"):
                if (index := path / "index.json").exists():
                    index.touch()  # used now: others that make room take the oldest
                else:
                    builder.build(image.reference, image.dockerfile, image.checkout)
                    builder.keep(f"{REGISTRY}/{self.role}", KEPT, STACKS)
        return path

    def _copy(self, target: Path) -> ProjectImage:
        """Copy what it is made from, with the same modes and times in all checkouts: builders keep layers by these, too."""
        for path in (self.dockerfile, self.checkout / ".dockerignore", *self.sources()):
            copy = target / path.relative_to(self.checkout)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        for path in (target, *target.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
            os.utime(path, (_TIME, _TIME))
        return ProjectImage(self.role, target)


def copied(dockerfile: str) -> list[str]:
    """What a Dockerfile takes from its context: the sources of COPY, but for those from another stage."""
    lines = re.findall(r"^COPY\s+(.+)$", dockerfile.replace("\\\n", " "), re.MULTILINE | re.IGNORECASE)
    parts = [shlex.split(line) for line in lines]
    return [source for part in parts if not part[0].startswith("--from") for source in part[:-1] if source[:2] != "--"]


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    else:
        yield path


def ensure(cluster: Cluster, role: Role, report: Callable[[str], None] = print) -> str:
    """Have an image in every node of a cluster.

    What that takes: a build after a change of dependencies minutes, after a change of code seconds, otherwise nothing. With
    CLUSTER=current the image is one that the cluster can pull: `$E2E_WORKER_IMAGE`, `$E2E_OPERATOR_IMAGE`.

    Args:
        cluster: One that runs.
        role: `worker` or `operator`.
        report: Told what is built and how long it took.

    Returns:
        Its name, for a pod's `image`; `imagePullPolicy` must not be `Always`.

    Raises:
        ClusterError: It cannot be built or brought in; the message has the reason.
    """
    image = ProjectImage(role)
    match cluster:
        case LocalCluster():
            cluster.load_image(image.layout(Builder(report=report)))
        case KindCluster():
            cluster.build_image(image.reference, image.dockerfile, image.checkout)
        case _:
            variable = f"E2E_{role.upper()}_IMAGE"
            if not (given := os.environ.get(variable)):
                raise ClusterError(
                    f"build {image.dockerfile.name}, push it where the cluster pulls from, and set {variable} to its name"
                )
            return given
    return image.reference


def digest(role: Role, builder: Builder | None = None) -> str:
    """The digest of an image that is built already, such as `sha256:...`.

    Raises:
        ClusterError: It is not built.
    """
    image = ProjectImage(role)
    path = (builder or Builder()).layout(image.reference)
    if not (path / "index.json").exists():
        raise ClusterError(f"{image.reference} is not built; `python -m e2e.cluster images {role}` does it")
    (found,) = images(Folder(path))
    return found.digest


def prune(builder: Builder) -> list[str]:
    """Remove all images of the project but the newest of each role, and the layers that nothing needs; their names."""
    old = [name for role in ROLES for name in builder.keep(f"{REGISTRY}/{role}", 1)]
    builder.prune()
    return old
