"""Pins: what is built, and under which name it is cached."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.cluster import pins
from e2e.cluster.errors import ClusterError
from e2e.cluster.pins import TOOLS, TOOLS_DIRECTORY, Tool
from e2e.cluster.store import Store

KUBERNETES = next(tool for tool in TOOLS if tool.directory == "kubernetes")
IMAGES = next(tool for tool in TOOLS if tool.directory == "images")
ids = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.directory)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A copy of tools/ that a test may change."""
    for tool in TOOLS:
        shutil.copytree(TOOLS_DIRECTORY / tool.directory, tmp_path / tool.directory)
    return tmp_path


@ids
def test_every_tool_has_a_version_and_sums(tool: Tool) -> None:
    assert re.fullmatch(r"v\d+\.\d+\.\d+", pins.version(tool))
    assert (TOOLS_DIRECTORY / tool.directory / "go.sum").stat().st_size > 0


@ids
def test_programs_of_other_modules_are_tool_directives(tool: Tool) -> None:
    # Without the directive `go mod tidy` would drop the module, and a dependency bot would not see it.
    text = (TOOLS_DIRECTORY / tool.directory / "go.mod").read_text()
    declared = set(re.findall(r"^(?:tool |\t)(\S+)$", text, re.MULTILINE))
    assert {package for package in tool.programs.values() if not package.startswith(".")} <= declared


@ids
def test_programs_that_are_built_together_are_named_after_their_packages(tool: Tool) -> None:
    # Go names them so when its output is a folder; one alone is named by us.
    if len(tool.programs) > 1:
        assert all(package.rpartition("/")[2] == name for name, package in tool.programs.items())


@ids
def test_our_own_programs_are_there(tool: Tool) -> None:
    directory = TOOLS_DIRECTORY / tool.directory
    for package in tool.programs.values():
        if package.startswith("."):
            assert (directory / package / "main.go").exists()


def test_the_parts_of_kubernetes_have_one_version() -> None:
    # A bot that bumps k8s.io/kubernetes does not bump the replacements of its staging modules.
    text = (TOOLS_DIRECTORY / "kubernetes" / "go.mod").read_text()
    wanted = "v0." + pins.version(KUBERNETES).removeprefix("v1.")
    replaced = re.findall(r"^(?:replace)?\s*(k8s\.io/\S+) => (\S+) (\S+)$", text, re.MULTILINE)
    assert len(replaced) > 25
    assert [line for line in replaced if line[0] != line[1] or line[2] != wanted] == []
    assert pins.version(IMAGES) == wanted


def test_a_key_is_stable(tools: Path) -> None:
    assert [pins.key(tool, tools) for tool in TOOLS] == [pins.key(tool) for tool in TOOLS]


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "fakegpu/main.go", "another.go"])
def test_a_key_changes_with_every_source(tools: Path, name: str) -> None:
    path = tools / "images" / name
    before = {tool.directory: pins.key(tool, tools) for tool in TOOLS}
    path.write_text((path.read_text() if path.exists() else "package main") + "\n")
    after = {tool.directory: pins.key(tool, tools) for tool in TOOLS}
    assert {directory for directory in before if before[directory] != after[directory]} == {"images"}


def test_a_key_changes_with_flags_images_and_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pins.key(KUBERNETES)
    assert pins.key(replace(KUBERNETES, tags="other")) != first
    assert pins.key(replace(KUBERNETES, images={"kubectl": ""})) != first
    monkeypatch.setattr(pins, "system", lambda: ("linux", "riscv64"))
    assert pins.key(KUBERNETES) != first


def test_the_tag_of_an_image_is_its_key() -> None:
    reference = pins.image_reference("fakegpu")
    assert re.fullmatch(r"localhost/drumline/fakegpu:[0-9a-f]{16}", reference)
    assert reference.rpartition(":")[2] in pins.key(IMAGES)


def test_a_module_that_is_not_required_is_named(tools: Path) -> None:
    (tools / "etcd" / "go.mod").write_text("module x\n")
    tool = next(tool for tool in TOOLS if tool.directory == "etcd")
    with pytest.raises(ClusterError, match=r"does not require go\.etcd\.io/etcd/server/v3; run `go get"):
        pins.version(tool, tools)


def test_the_linker_gets_the_version() -> None:
    (flags,) = (flag for flag in pins.flags(KUBERNETES) if flag.startswith("-ldflags="))
    assert f"-X=k8s.io/component-base/version.gitVersion={pins.version(KUBERNETES)}" in flags.split()


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("E2E_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().program("etcd").is_relative_to(tmp_path / "drumline" / "cluster")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store().root == tmp_path / "home" / ".cache" / "drumline" / "cluster"


def test_what_is_cached_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")  # no go
    said: list[str] = []
    store = Store(root=tmp_path, report=said.append)
    for name in pins.CLUSTER_PROGRAMS:
        store.program(name).parent.mkdir(exist_ok=True)
        store.program(name).touch()
    assert store.missing(pins.CLUSTER_PROGRAMS) == list(pins.IMAGES)
    for name in pins.IMAGES:
        store.image(name).touch()
    store.ensure(pins.CLUSTER_PROGRAMS)
    assert said == []


def test_without_go_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match=r"etcd-[0-9a-f]+ is not complete.*install Go"):
        Store(root=tmp_path).ensure(["etcd"])


def test_prune_removes_other_versions_only(tmp_path: Path) -> None:
    store = Store(root=tmp_path)
    old, new, other = tmp_path / "etcd-0123456789abcdef", store.program("etcd").parent, tmp_path / "worker-images"
    for directory in (old, new, other):
        directory.mkdir()
        (directory / "file").touch()
    assert store.prune() == [old]
    assert sorted(tmp_path.iterdir()) == sorted([new, other])
