"""A nursery that is started early: for what, and where no process can be started."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from drumline import early, host
from drumline.contract import RunnerSettings
from drumline.runner import nursery_process
from drumline.runner.nursery_process import Asked


def test_where_no_process_can_be_started_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-interpreter"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = Asked("a:B")
    before = os.listdir("/dev/fd")
    nursery_process.start_early(asked)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/dev/fd")) == len(before)
    # The runner then tries again, in a directory of its own, and tells what is wrong.
    directory = nursery_process.directory_for(asked)
    assert Path(directory).parent == tmp_path
    with pytest.raises(FileNotFoundError, match="no-such-interpreter"):
        nursery_process.started(asked, directory)


WORKER = "import drumline\n\n\nclass Mine(drumline.DistributedWorker):\n    pass\n"
APP = "import drumline\n\n\nclass Mine(drumline.App):\n    pass\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Asked]:
    found: list[Asked] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(early, "start_early", found.append)
    monkeypatch.setattr(nursery_process, "start_early", found.append)
    return found


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("run app.py", "app.py"),
        ("run app.py -n 2 --setup model=tiny", "app.py"),
        ("run app.py --reload", ""),  # the process that it runs does so itself
        ("run app.py --help", ""),
        ("run", ""),
        ("run -n 2 app.py", "-n"),  # which is none
        ("serve", "env.py:Env"),
        ("serve --debug", "env.py:Env"),
        ("serve --help", ""),
        ("doctor", ""),
        ("", ""),
    ],
)
def test_the_target_of_a_command_line(line: str, target: str) -> None:
    assert early.guess(line.split(), {"DRUMLINE_TARGET": "env.py:Env"}) == target


@pytest.mark.parametrize("target", ["app.py", "app.py:Mine", "app:Mine"])
def test_it_is_begun_for_what_the_runner_will_ask_for(asked: list[Asked], tmp_path: Path, target: str) -> None:
    (tmp_path / "app.py").write_text(WORKER)
    early.begin(target)
    host.build_service(RunnerSettings(target=target), early=True)
    assert asked == [asked[0]] * 2


@pytest.mark.parametrize(
    "text", [APP, "", "class Mine(", "import torch\n\n\nclass Mine(torch.nn.Module):\n    pass\n", "\0"]
)
def test_it_is_not_begun_for_what_is_no_worker(asked: list[Asked], tmp_path: Path, text: str) -> None:
    (tmp_path / "app.py").write_text(text)
    (tmp_path / "app.yaml").write_text(text)
    for target in (
        "app.py",
        "app.py:Mine",
        "app:Mine",
        "app.yaml",
        "app.py:Other",
        "other.py",
        "other:Mine",
        "",
        "\0.py",
        "a b",
        "-n",
    ):
        early.begin(target)
    assert asked == []
