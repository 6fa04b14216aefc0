"""A nursery that is started early, where no process can be started."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

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
