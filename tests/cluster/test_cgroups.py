"""Cgroups of both versions, in a directory that looks like /sys/fs/cgroup; the real ones are in e2e/scenarios."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from e2e.cluster import cgroups
from e2e.cluster.errors import ClusterError

ALL = "cpuset cpu io memory pids"


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    for name in ("cpu", "cpuset", "memory", "unified"):
        (tmp_path / name).mkdir()
        if name != "unified":
            (tmp_path / name / "tasks").touch()
    (tmp_path / "cpuset" / "cpuset.cpus").write_text("0-1\n")
    (tmp_path / "cpuset" / "cpuset.mems").write_text("0\n")
    (tmp_path / "cpuacct").symlink_to("cpu")
    return tmp_path


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    for directory in (tmp_path, tmp_path / "d-1"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.controllers").write_text(ALL)
        (directory / "cgroup.subtree_control").write_text("memory pids\n")
    return tmp_path


def test_v1_has_a_cgroup_in_every_tree(v1: Path) -> None:
    assert cgroups.reserve("d-1", v1)
    cgroups.create("d-1", ["a", "b"], v1)
    found = {str(path.relative_to(v1)) for path in v1.glob("*/d-1/*") if path.is_dir() and not path.is_symlink()}
    assert {f"{tree}/d-1/{node}" for tree in ("cpu", "cpuset", "memory") for node in "ab"} <= found
    assert not (v1 / "unified/d-1").exists()
    assert (v1 / "cpuset/d-1/b/cpuset.cpus").read_text() == "0-1\n"


def test_a_network_is_reserved_once(v1: Path) -> None:
    assert [cgroups.reserve("d-1", v1), cgroups.reserve("d-1", v1), cgroups.reserve("d-2", v1)] == [True, False, True]


def test_v2_hands_its_controllers_down(v2: Path) -> None:
    cgroups.create("d-1", ["a"], v2)
    assert (v2 / "d-1" / "a").is_dir()
    for directory in (v2, v2 / "d-1"):
        # Each write to the real file adds one controller; to this one the last write stays.
        assert (directory / "cgroup.subtree_control").read_text() == "+io"


def test_v2_without_a_needed_controller_is_refused(v2: Path) -> None:
    (v2 / "cgroup.controllers").write_text("memory pids")
    with pytest.raises(ClusterError, match=r"no cgroup controllers cpu, cpuset; .*--cgroupns=host"):
        cgroups.create("d-1", ["a"], v2)


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="CLUSTER=kind"):
        cgroups.trees(tmp_path)


def test_removal_takes_all_trees_and_only_ours(v1: Path) -> None:
    for directory in ("cpu/d-1/a/pod/x", "unified/d-1/pod", "memory/d-11"):
        os.makedirs(v1 / directory)
    cgroups.remove("d-1", v1, limit=1)
    assert not list(v1.glob("*/d-1"))
    assert (v1 / "memory/d-11").exists()


def test_a_cgroup_that_stays_busy_is_named(v1: Path) -> None:
    (v1 / "cpu/d-1").mkdir()
    (v1 / "cpu/d-1/file").touch()  # rmdir fails, as it does while a process is inside
    with pytest.raises(ClusterError, match=r"the removal of .*cpu/d-1"):
        cgroups.remove("d-1", v1, limit=0.1)
