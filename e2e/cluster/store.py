"""The user's cache of built binaries and images, shared by all checkouts on the machine."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import pins
from .errors import ClusterError
from .oci import write_image
from .pins import OWNERS, TOOLS, Tool

#: The compiler collects its garbage less often, which saves a seventh of a build's CPU time, and stays below a gigabyte.
_GO_MEMORY = {"GOGC": "400", "GOMEMLIMIT": "1GiB"}


def cache_directory() -> Path:
    """`$E2E_CACHE_DIR`, else `drumline/cluster` in the user's cache folder (XDG)."""
    if folder := os.environ.get("E2E_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drumline" / "cluster"


@dataclass(frozen=True)
class Store:
    """Binaries and image archives, one directory per tool and hash of its pins.

    Attributes:
        root: Where they lie.
        tools: Where the go.mod files are.
        report: Told what is built and how long it took.
    """

    root: Path = field(default_factory=cache_directory)
    tools: Path = pins.TOOLS_DIRECTORY
    report: Callable[[str], None] = print

    def directory(self, tool: Tool) -> Path:
        """Where the binaries of `tool` are, or will be."""
        return self.root / pins.key(tool, self.tools)

    def program(self, name: str) -> Path:
        """Where the binary `name` is, or will be."""
        return self.directory(OWNERS[name]) / name

    def image(self, name: str) -> Path:
        """Where the archive of the image `name` is, or will be."""
        return self.program(name).with_suffix(".tar")

    def search_path(self) -> str:
        """All directories, for PATH."""
        return ":".join(str(self.directory(tool)) for tool in TOOLS)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the named binaries that are not there, or whose image is not."""
        return [
            name
            for name in names
            if not self.program(name).exists() or (name in OWNERS[name].images and not self.image(name).exists())
        ]

    def ensure(self, names: Iterable[str]) -> None:
        """Build what is missing; two builds of the same tool wait for each other.

        Args:
            names: Of binaries, from `pins.OWNERS`.

        Raises:
            ClusterError: Go is needed and not installed, or a build failed.
        """
        wanted: dict[str, list[str]] = {}
        for name in self.missing(names):
            wanted.setdefault(OWNERS[name].directory, []).append(name)
        for tool in TOOLS:
            if tool.directory in wanted:
                with self._locked(tool):
                    if missing := self.missing(wanted[tool.directory]):
                        self._build(tool, missing)

    def specification(self) -> Path:
        """The OpenAPI document of the pinned Kubernetes, from its module; kept, so that Go is needed only once.

        Raises:
            ClusterError: It is not there yet, and there is no `go`.
        """
        tool = OWNERS["kube-apiserver"]
        path = self.directory(tool) / "swagger.json"
        if not path.exists():
            with self._locked(tool):
                answer = self._go(tool, "mod", "download", "-json", tool.module)
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(".draft")
                shutil.copyfile(Path(json.loads(answer)["Dir"]) / "api/openapi-spec/swagger.json", draft)
                draft.replace(path)
        return path

    def prune(self) -> list[Path]:
        """Remove what other versions of the pins have left, and return it."""
        current = {self.directory(tool) for tool in TOOLS}
        names = {tool.directory for tool in TOOLS}
        old = [
            path
            for path in (sorted(self.root.iterdir()) if self.root.exists() else [])
            if path.is_dir() and path not in current and path.name.rpartition("-")[0] in names
        ]
        for path in old:
            shutil.rmtree(path)
        return old

    @contextmanager
    def _locked(self, tool: Tool) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{tool.directory}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _build(self, tool: Tool, names: list[str]) -> None:
        started = time.monotonic()
        self.report(f"building {' '.join(names)} ({pins.version(tool, self.tools)}) ...")
        directory = self.directory(tool)
        directory.mkdir(parents=True, exist_ok=True)
        # Binaries are linked next to their place and moved there, so a build that was interrupted leaves none half done.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as draft:
            missing = [name for name in names if not self.program(name).exists()]
            # With a folder as output Go names each binary after its package, as `programs` does where there are several.
            output = draft if len(missing) > 1 else str(Path(draft) / missing[0]) if missing else ""
            if missing:
                packages = [tool.programs[name] for name in missing]
                self._go(tool, "build", *pins.flags(tool, self.tools), "-o", output, *packages)
            for name in missing:
                (Path(draft) / name).replace(self.program(name))
        for name in set(names) & set(tool.images):
            write_image(
                self.image(name),
                pins.image_reference(name, self.tools),
                self.program(name),
                user=tool.images[name],
                architecture=pins.system()[1],
            )
        self.report(f"built {tool.directory} in {time.monotonic() - started:.1f} s")

    def _go(self, tool: Tool, *arguments: str) -> str:
        """Run go in the tool's directory; what it says goes to our error output, what it answers is returned."""
        if not shutil.which("go"):
            raise ClusterError(
                f"{self.directory(tool)} is not complete, and there is no `go` on PATH; install Go 1.26 or newer, "
                "or copy the directory from a machine that has it"
            )
        environment = _GO_MEMORY | os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
        result = subprocess.run(
            ["go", *arguments],
            cwd=self.tools / tool.directory,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if result.returncode:
            raise ClusterError(f"`go {arguments[0]}` failed in tools/{tool.directory}, see above")
        return result.stdout
