"""Processes that outlive the command that started them, known by pid, start time and boot."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Self

from .errors import ClusterError


def command(*arguments: str | Path, env: Mapping[str, str] | None = None, input: str | None = None) -> str:
    """Run a command and return what it prints.

    Raises:
        ClusterError: It failed; the message is the command and its error output.
    """
    line = [str(argument) for argument in arguments]
    result = subprocess.run(line, text=True, capture_output=True, env=env, input=input, check=False)
    if result.returncode:
        raise ClusterError(f"{shlex.join(line)}: {shortened(result.stderr.strip() or result.stdout.strip())}")
    return result.stdout


def shortened(text: str, first: int = 10, last: int = 30) -> str:
    """The first and the last lines of a long text."""
    lines = text.splitlines()
    if len(lines) <= first + last:
        return text
    return "\n".join([*lines[:first], f"... {len(lines) - first - last} lines ...", *lines[-last:]])


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the name, or None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


@dataclass(frozen=True)
class Process:
    """One process, and never a later one that got the same pid.

    Attributes:
        pid: As the machine sees it.
        started: In clock ticks since boot.
        boot: The boot during which it ran.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this pid now.

        Raises:
            ProcessLookupError: There is none.
        """
        fields = _stat(pid)
        if fields is None:
            raise ProcessLookupError(pid)
        return cls(pid, int(fields[19]), _boot())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The process that `save` wrote down, or None."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None

    def save(self, path: Path) -> None:
        """Write it down for later commands. Others may read at the same time: they see a whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)

    def _current(self) -> list[str] | None:
        fields = _stat(self.pid) if self.boot == _boot() else None
        return fields if fields and int(fields[19]) == self.started else None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._current() is not None

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = self._current()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

    @property
    def resident_bytes(self) -> int:
        """Resident set."""
        fields = self._current()
        return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0

    @property
    def children(self) -> list[int]:
        """The pids of its children."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        return []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it is gone already."""
        with self._descriptor() as descriptor, contextlib.suppress(ProcessLookupError):
            if descriptor is not None:
                signal.pidfd_send_signal(descriptor, number)

    def wait(self, limit: float) -> bool:
        """Wait until it is gone, at most `limit` seconds; whether it is."""
        with self._descriptor() as descriptor:
            if descriptor is not None:
                poller = select.poll()
                poller.register(descriptor, select.POLLIN)
                poller.poll(limit * 1000)
        with contextlib.suppress(ChildProcessError):  # it may be our own child, or somebody else's
            os.waitpid(self.pid, os.WNOHANG)
        return not self.alive

    def kill(self, limit: float = 10.0) -> None:
        """End it at once.

        Raises:
            ClusterError: It is still there after `limit` seconds.
        """
        self.signal(signal.SIGKILL)
        if not self.wait(limit):
            raise ClusterError(
                f"process {self.pid} did not end within {limit:.0f} s of SIGKILL; see /proc/{self.pid}/stack"
            )

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int | None]:
        """A pidfd that is certain to mean this process, or None when it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            yield descriptor if self.alive else None
        finally:
            os.close(descriptor)
