"""Promises of GPUs, and what is left behind for Kubernetes to show."""

import json

import msgspec
import pytest

from drumline import gpus, host
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, NotReady, RankLost, SetupFailed
from drumline.runner.status import failure_status

TWO = tuple(gpus.Gpu(n, "H200", 139 << 30, f"GPU-{n}a") for n in range(2))


def fitted(driver, **settings):
    return host.fit_to_gpus(RunnerSettings(**settings), driver)


def test_promised_gpus_are_used():
    settings = fitted(gpus.Driver("580", TWO), num_gpus=2)
    assert (settings.device, settings.world_size) == ("cuda", 2)


def test_a_given_world_size_stays():
    assert fitted(gpus.Driver("580", TWO), num_gpus=2, world_size=4).world_size == 4


def test_an_app_without_gpus_is_left_alone():
    settings = RunnerSettings(world_size=3)
    assert host.fit_to_gpus(settings, gpus.Driver()) is settings


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (gpus.Driver(), "sees no CUDA device"),
        (gpus.Driver("580", TWO[:1]), "sees 1 CUDA device;"),
        (gpus.Driver("580", TWO[:1], hidden=1), r"sees 1 CUDA device \(1 more are hidden by CUDA_VISIBLE_DEVICES\)"),
    ],
)
def test_a_broken_promise_is_told_with_its_cure(driver, said):
    with pytest.raises(ConfigurationError, match=rf"num_gpus is 2, but this process {said}.*DRUMLINE_DEVICE=cpu"):
        fitted(driver, num_gpus=2)


def test_the_cpu_may_be_chosen():
    settings = fitted(gpus.Driver(), num_gpus=2, device="cpu")
    assert (settings.device, settings.world_size) == ("cpu", 2)


def test_a_driver_that_cannot_be_asked_leaves_it_to_the_ranks():
    assert fitted(gpus.Driver(problem="Insufficient Permissions"), num_gpus=2).device == "cuda"


ALL = [*TWO, gpus.Gpu(2, "H200", 1, "GPU-2b")]


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1,0", [1, 0]),
        ("0,9,1", [0]),
        ("0,0", [0]),
        ("GPU-1", [1]),
        ("GPU-", []),
        (" 2 , GPU-0a", [2, 0]),
        ("MIG-123,MIG-456", [-1, -1]),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(setting, indices):
    assert [gpu.index for gpu in gpus.visible(ALL, setting)] == indices


def test_looking_for_gpus_never_fails():
    assert isinstance(gpus.look({}), gpus.Driver)


def test_the_reason_is_left_for_kubernetes(tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    error = SetupFailed("no weights", rank=1, exception_type="OSError", remote_traceback="Traceback\n  here")
    assert host.write_termination_log(error, log)
    assert log.read_text() == (
        'SetupFailed: rank 1: OSError: no weights\nTraceback\n  here\n{"reason": "SetupFailed", "rank": 1}'
    )


def test_the_rank_to_blame_is_left_for_programs(tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    lost = RankLost(1, signal=9)
    seen = msgspec.to_builtins(failure_status(lost, 1.0))
    for error in (lost, NotReady("the group failed", failure=seen)):
        host.write_termination_log(error, log)
        facts = json.loads(log.read_text().splitlines()[-1])
        assert (facts["rank"], facts["signal"]) == (1, 9)
        assert "exitCode" not in facts
    host.write_termination_log(ConfigurationError("no such class"), log)
    assert log.read_text() == "ConfigurationError: no such class"


def test_a_long_reason_keeps_both_ends(tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    host.write_termination_log(SetupFailed("x" * 9000 + "end", rank=0), log)
    data = log.read_bytes()
    assert len(data) <= 4096
    assert data.startswith(b"SetupFailed: rank 0: xxx")
    assert data.endswith(b'end\n{"reason": "SetupFailed", "rank": 0}')


def test_no_stray_file_is_made(tmp_path):
    assert not host.write_termination_log(RankLost(0, signal=9), tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["", "app.yaml", "nowhere.py", "no_such_module_anywhere:W"])
def test_a_target_that_cannot_be_served_is_told(target, tmp_path, monkeypatch):
    (tmp_path / "app.yaml").write_text("kind: DistributedApp")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError):
        host.build_service(RunnerSettings(target=target))
