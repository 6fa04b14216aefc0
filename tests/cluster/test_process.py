"""Processes that are known by more than their pid, and waits. Real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.cluster.errors import ClusterError
from e2e.cluster.process import Process, command, shortened
from e2e.cluster.waiting import tail, wait_for

pytestmark = pytest.mark.linux


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    program = "import signal; print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # before, it may have no memory of its own yet
        yield process
        process.kill()


def test_a_process_is_written_down_and_killed(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    Process.of(child.pid).save(tmp_path / "x.pid")
    known = Process.load(tmp_path / "x.pid")
    assert known
    assert known.alive
    assert known.resident_bytes > 0
    known.kill()
    assert not known.alive
    assert (known.resident_bytes, known.cpu_seconds, known.children) == (0, 0.0, [])
    known.kill()  # nothing happens
    assert Process.load(tmp_path / "none.pid") is None


@pytest.mark.parametrize("other", [{"started": 1}, {"boot": "another"}])
def test_another_process_with_the_same_pid_is_left_alone(
    child: subprocess.Popen[bytes], other: dict[str, int | str]
) -> None:
    stranger = replace(Process.of(child.pid), **other)  # type: ignore[arg-type]
    assert not stranger.alive
    stranger.kill()
    assert child.poll() is None
    assert Process.of(child.pid).alive


def test_a_wait_ends_with_the_process(child: subprocess.Popen[bytes]) -> None:
    process = Process.of(child.pid)
    assert not process.wait(0.05)
    process.signal(signal.SIGTERM)
    assert process.wait(5)


def test_no_such_process() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    with pytest.raises(ProcessLookupError):
        Process.of(child.pid)


def test_a_failed_command_says_what_it_said() -> None:
    with pytest.raises(ClusterError, match=r"sh -c 'echo no >&2; exit 3': no"):
        command("sh", "-c", "echo no >&2; exit 3")
    assert command("cat", input="x") == "x"


def test_a_wait_is_over_when_the_condition_holds() -> None:
    looks = iter([False, False, True])
    wait_for("it", lambda: next(looks), limit=5)
    assert list(looks) == []


def test_a_wait_is_bounded_and_explains() -> None:
    with pytest.raises(ClusterError, match="it did not get ready in 0 s\nbecause"):
        wait_for("it", lambda: False, limit=0.1, explain=lambda: "because")


def test_a_dead_process_ends_the_wait_at_once(child: subprocess.Popen[bytes]) -> None:
    process = Process.of(child.pid)
    started = time.monotonic()

    def dead() -> str:
        if not process.alive:
            return "it died"
        process.signal(signal.SIGKILL)
        return ""

    with pytest.raises(ClusterError, match="it died"):
        wait_for("it", lambda: False, limit=60, watched=[process.pid], dead=dead)
    assert time.monotonic() - started < 30


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("1\n2\n3456\n")
    assert tail(tmp_path / "log", 2, 3) == "2\n345"
    assert tail(tmp_path / "none") == "(no log)"


def test_long_output_is_shortened_in_its_middle() -> None:
    text = "\n".join(map(str, range(100)))
    assert shortened(text, 2, 1) == "0\n1\n... 97 lines ...\n99"
    assert shortened(text, 60, 40) == text
