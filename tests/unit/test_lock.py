"""requirements.lock fits pyproject.toml, and installs anywhere."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
#: One pin each, with its hashes and comments.
BLOCKS = re.split(r"\n(?=\S)", LOCK.strip())


def wanted(*, dev: bool = True) -> list[Requirement]:
    """Direct requirements of a development environment: ours, the extras that it holds, the groups."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines, todo = [*PROJECT["project"]["dependencies"]], ["diffusion", "operator", "s3"]
    if dev:
        lines += [line for group in PROJECT["dependency-groups"].values() for line in group]
    while todo:
        for line in extras[todo.pop()]:
            requirement = Requirement(line)
            if requirement.name == "drumline":
                todo.extend(requirement.extras)
            else:
                lines.append(line)
    return [Requirement(line) for line in lines]


def locked() -> dict[str, list[Requirement]]:
    """Pins by name; one name may be pinned for several Python versions."""
    pins: dict[str, list[Requirement]] = {}
    for block in BLOCKS:
        pin = Requirement(block.splitlines()[0].removesuffix("\\").strip())
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_requirement_is_locked(requirement: Requirement) -> None:
    pins = locked().get(canonicalize_name(requirement.name), [])
    assert pins, "not in requirements.lock: run `make lock`"
    for pin in pins:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert requirement.specifier.contains(version, prereleases=True), f"{pin} in requirements.lock: run `make lock`"


@pytest.mark.timeout(20)  # it parses every source file
def test_every_import_is_declared() -> None:
    # A package that only comes along with another one may go away with it.
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # pydantic and its core have one version; annotationlib is in the standard library from 3.14 on.
    owners = metadata.packages_distributions() | {"pydantic_core": ["pydantic"]}
    known = sys.stdlib_module_names | {"drumline", "annotationlib"}
    missing = {}
    for path in sorted((ROOT / "worker" / "drumline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - known:
                if not declared & {canonicalize_name(owner) for owner in owners.get(top, [])}:
                    missing[top] = str(path.relative_to(ROOT))
    assert missing == {}


def test_nothing_else_is_locked_as_ours() -> None:
    names = {canonicalize_name(requirement.name) for requirement in wanted()}
    # A block ends with comments that say who asked for it: `# via drumline (pyproject.toml)`.
    ours = {canonicalize_name(block.split("==")[0]) for block in BLOCKS if "drumline (" in block}
    assert ours
    assert ours - names == set(), "run `make lock`"


def test_the_lock_names_no_host() -> None:
    assert "://" not in LOCK
    assert "--index" not in LOCK
    assert "--find-links" not in LOCK


def test_every_pin_has_hashes() -> None:
    assert len(BLOCKS) > 50
    assert [block.splitlines()[0] for block in BLOCKS if "--hash=sha256:" not in block] == []
