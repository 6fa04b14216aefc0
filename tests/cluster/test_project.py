"""The names of the project's images change with what goes into them, and with nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from e2e.cluster import builder, project
from e2e.cluster.builder import Builder
from e2e.cluster.current import CurrentCluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.project import ROLES, ProjectImage, copied, ensure


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the images are made from, and a README."""
    for name in ("Dockerfile.worker", "Dockerfile.operator", ".dockerignore", "LICENSE", "pyproject.toml", "README.md"):
        shutil.copyfile(CHECKOUT / name, tmp_path / name)
    for name in ("images", "worker", "operator"):
        shutil.copytree(CHECKOUT / name, tmp_path / name)
    return tmp_path


def names(checkout: Path) -> dict[str, str]:
    return {role: ProjectImage(role, checkout).reference for role in ROLES}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {role for role in before if before[role] != after[role]}


def test_another_checkout_finds_the_same_image(checkout: Path) -> None:
    assert names(checkout) == names(CHECKOUT)


@pytest.mark.parametrize(
    ("file", "roles"),
    [
        ("worker/drumline/errors.py", {"worker", "operator"}),
        ("operator/drumline_operator/plan.py", {"operator"}),
        ("images/torch.lock", {"worker"}),
        ("images/operator.lock", {"operator"}),
        ("Dockerfile.worker", {"worker"}),
        ("README.md", set()),
    ],
)
def test_a_change_concerns_the_images_that_have_the_file(checkout: Path, file: str, roles: set[str]) -> None:
    before = names(checkout)
    with (checkout / file).open("a") as opened:
        opened.write("# changed\n")
    assert changed(before, names(checkout)) == roles


def test_a_new_file_counts_and_compiled_ones_do_not(checkout: Path) -> None:
    before = names(checkout)
    (checkout / "operator/drumline_operator/__pycache__").mkdir(exist_ok=True)
    (checkout / "operator/drumline_operator/__pycache__/new.pyc").touch()
    assert names(checkout) == before
    (checkout / "operator/drumline_operator/new.py").touch()
    assert changed(before, names(checkout)) == {"operator"}


def test_a_base_that_is_made_otherwise_is_another_image(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(checkout)
    monkeypatch.setattr(builder, "PACKAGES", "python3")
    assert changed(before, names(checkout)) == set(ROLES)


def test_what_a_dockerfile_copies() -> None:
    text = "FROM a AS b\nCOPY --chown=1:1 one two \\\n  three /there/\nCOPY --from=b /x /y\ncopy four ./\nRUN cp five six\n"
    assert copied(text) == ["one", "two", "three", "four"]


def test_a_cluster_that_pulls_its_images_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2E_WORKER_IMAGE", raising=False)
    with pytest.raises(ClusterError, match=r"Dockerfile\.worker.*E2E_WORKER_IMAGE"):
        ensure(CurrentCluster(), "worker")
    monkeypatch.setenv("E2E_WORKER_IMAGE", "example/worker:1")
    assert ensure(CurrentCluster(), "worker") == "example/worker:1"


def test_an_image_that_is_not_built_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"worker:\w+ is not built.*images worker"):
        project.digest("worker", Builder(root=tmp_path))


def test_layouts_share_the_blobs_that_they_have_in_common(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for layout, digests in ((one, "ab"), (two, "b")):
        (layout / "blobs/sha256").mkdir(parents=True)
        for digest in digests:
            (layout / "blobs/sha256" / digest).write_text(digest)
    builder.link_siblings(two)
    assert (two / "blobs/sha256/a").samefile(one / "blobs/sha256/a")
    assert not (two / "blobs/sha256/b").samefile(one / "blobs/sha256/b")
    os.unlink(one / "blobs/sha256/a")
    assert (two / "blobs/sha256/a").read_text() == "a"
