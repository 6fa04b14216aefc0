"""Each problem of a machine is found, and its cure is named."""

import resource
import socket
from pathlib import Path

import pytest

from drumline import doctor, gpus

GPU = gpus.Gpu(0, "H200", 139 << 30, "GPU-0")
TORCH = {
    "version": "2.15.0",
    "seconds": 2.0,
    "cuda": "13.2",
    "gloo": True,
    "nccl": True,
    "nccl_version": "2.30.7",
    "available": True,
    "devices": 1,
}


def status(findings):
    return {finding.name: finding.status for finding in findings}


def test_this_machine_is_fine():
    found = [*doctor.check_system(), doctor.check_platform(), doctor.check_loopback(), doctor.check_temporary()]
    assert {finding.status for finding in found} <= {"ok", "info"}


def test_missing_packages():
    found = list(doctor.check_packages({"torch": "2.15"}.get))
    assert found[0].status == "problem"
    assert "fastapi" in found[0].detail
    assert "pip install" in found[0].cure
    assert {finding.status for finding in found[1:]} == {"info"}


def test_torch_is_fine():
    assert status(doctor.check_torch(TORCH, gpus.Driver("580", (GPU,)))) == {"torch": "ok", "NCCL": "ok"}


def test_a_torch_that_cannot_use_the_gpus():
    driver = gpus.Driver("470.1", (GPU,))
    (finding, _) = doctor.check_torch({**TORCH, "available": False}, driver)
    assert finding.status == "problem"
    assert "470.1" in finding.cure
    (finding, _) = doctor.check_torch({**TORCH, "available": False, "cuda": None}, driver)
    assert "CUDA build" in finding.cure


def test_a_torch_without_nccl():
    without = {**TORCH, "nccl": False}
    assert status(doctor.check_torch(without, gpus.Driver("580", (GPU, GPU))))["NCCL"] == "problem"
    assert status(doctor.check_torch(without, gpus.Driver()))["NCCL"] == "info"


def test_a_torch_without_gloo():
    assert status(doctor.check_torch({**TORCH, "gloo": False}, gpus.Driver()))["torch"] == "problem"


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (gpus.Driver(), "info"),
        (gpus.Driver("580", (GPU,)), "ok"),
        (gpus.Driver("580", (), hidden=2), "warning"),
        (gpus.Driver(problem="Driver/library version mismatch"), "problem"),
    ],
)
def test_gpus(driver, expected):
    finding = doctor.check_gpus(driver)
    assert finding.status == expected
    assert bool(finding.cure) == (expected in {"warning", "problem"})


def test_shared_memory(tmp_path):
    assert doctor.check_shm(tmp_path, 0).status == "ok"
    assert doctor.check_shm(tmp_path, 1 << 40).status == "problem"
    assert doctor.check_shm(tmp_path / "none", 0).status == "problem"
    assert "--shm-size" in doctor.check_shm(Path("/proc"), 0).cure


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (65536, 65536, "ok"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok"),
        (1024, 65536, "warning"),
        (256, 65536, "problem"),
    ],
)
def test_open_files(soft, hard, expected):
    finding = doctor.check_open_files(soft, hard)
    assert finding.status == expected
    assert bool(finding.cure) == (expected != "ok")


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.check_port(port).status == "warning"
    assert doctor.check_port(port).status == "ok"


def test_no_place_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    finding = doctor.check_temporary()
    assert finding.status == "problem"
    assert "TMPDIR" in finding.cure


def test_no_kubectl(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert doctor.check_cluster().status == "info"
