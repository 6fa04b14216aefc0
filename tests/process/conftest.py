"""Proof, after every test and every module of this layer, that nothing was left behind.

Looked at: descendants of this process (also those that lost their parent), its file descriptors (sockets, pipes, shared
memory), threads that would keep the interpreter from ending, ``drumline-*`` in the temporary directory, ``/dev/shm``.
A fixture that outlives one test (a group shared by a module) is part of that test's starting point, and is looked at
when its module ends.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from drumline import context
from drumline.distributed import DistributedRunner
from drumline.runner.status import RunnerStatus

#: What ends by itself (a killed process, a closing thread) has this long to do so.
SETTLE_SECONDS = 5.0
#: Inherited by every process that these tests start, so that one whose parent died is found, too.
MARK, MARK_VALUE = "DRUMTEST_SESSION", uuid.uuid4().hex
#: Python's own helpers, one per interpreter and for its whole life.
INTERPRETER_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

SHM = Path("/dev/shm")
FDS = Path("/proc/self/fd")


class Snapshot:
    """What exists now, by a readable name per thing."""

    def __init__(self) -> None:
        self.things = {
            **_processes(),
            **_descriptors(),
            **_threads(),
            **{f"temp:{path.name}": str(path) for path in Path(tempfile.gettempdir()).glob("drumline-*")},
            **{f"shm:{name}": f"{SHM / name}" for name in _shm_names()},
        }

    def counts(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(
            re.sub(r"\d+", "", key) if key.startswith("fd:") else key.partition(":")[0] for key in self.things
        )

    def new_since(self, before: Snapshot, *, of_module: bool = False) -> list[str]:
        """Describe what is here and was not there ``before``; a channel's pool is not looked at until its module ends."""
        new = {key: words for key, words in self.things.items() if key not in before.things}
        if any(key.startswith("shm:") for key in new):
            foreign = _shm_of_others()
            new = {key: words for key, words in new.items() if key.removeprefix("shm:") not in foreign}
        if context.runners:  # result memory is pooled, and belongs to a group that still runs, like its loop's executor
            new = {k: words for k, words in new.items() if "/memfd:results" not in k and not k.startswith("executor:")}
        if context.runners or not of_module:
            new = {k: words for k, words in new.items() if "/memfd:payload" not in k}
        return sorted(words + _listening(key) for key, words in new.items())


def leftovers(before: Snapshot, *, of_module: bool = False) -> list[str]:
    """What was left behind since ``before``, after everything that ends by itself had its time."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        left = Snapshot().new_since(before, of_module=of_module)
        if not left or time.monotonic() > deadline:
            return left
        gc.collect()
        # A process or thread that is about to end; there is no one event for "any of these changed".
        threading.Event().wait(0.02)


@pytest.fixture(scope="session", autouse=True)
def private_temp() -> Iterator[Path]:
    """A temporary directory of this run's own: what lies in it was made by these tests, not by a neighbour."""
    with tempfile.TemporaryDirectory(prefix="dt-") as name:
        patch = pytest.MonkeyPatch()
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", name)
        patch.setenv(MARK, MARK_VALUE)
        yield Path(name)
        patch.undo()


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_module(private_temp: Path) -> Iterator[None]:
    """Fail the last test of a module when a fixture of the module leaked."""
    before = Snapshot()
    yield
    left = leftovers(before, of_module=True)
    assert not left, f"left behind by this module: {left}"


@pytest.fixture(autouse=True)
def nothing_left(nothing_left_by_module: None) -> Iterator[None]:
    """Fail a test that left something behind."""
    before = Snapshot()
    yield
    left = leftovers(before)
    assert not left, f"left behind by this test: {left}"


@pytest.fixture
def nothing_more_left(nothing_left_by_module: None) -> Iterator[None]:
    """For tests that restart a group which the module shares: others may be there afterwards, not more of them.

    Such a module has an autouse fixture ``nothing_left`` of its own that asks for this one.
    """
    before = Snapshot()
    yield
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        after = Snapshot()
        more = after.counts() - before.counts()
        del more["executor"]
        del more["fd::/memfd:payload (deleted)"]
        if context.runners:
            del more["fd::/memfd:results (deleted)"]
        if not more or time.monotonic() > deadline:
            break
        gc.collect()
        threading.Event().wait(0.02)
    assert not more, f"left behind by this test: {dict(more)} among {after.new_since(before)}"


async def _until(runner: DistributedRunner, condition: Callable[[RunnerStatus], object], timeout: float = 20) -> Any:
    async with asyncio.timeout(timeout):
        status = runner.status
        while not (found := condition(status)):
            status = await runner.wait_status(status.version, timeout)
    return found


@pytest.fixture(scope="session")
def until() -> Any:
    """``await until(runner, condition)``: the first true value of ``condition(status)``, seen at every change of status."""
    return _until


def _processes() -> dict[str, str]:
    found: dict[str, str] = {}
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            ours = process.pid in children or process.environ().get(MARK) == MARK_VALUE
            if not ours or process.status() == psutil.STATUS_ZOMBIE:
                continue  # a zombie holds nothing; its parent's descriptors and threads are looked at
            command = " ".join(process.cmdline())
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
            continue
        if not any(helper in command for helper in INTERPRETER_HELPERS):
            found[f"process:{process.pid}"] = f"process {process.pid} ({command[:120]})"
    return found


def _descriptors() -> dict[str, str]:
    if not FDS.exists():  # macOS: only their number is known
        return {f"fd:{n}": "one more file descriptor" for n in range(psutil.Process().num_fds())}
    found = {}
    for number in os.listdir(FDS):
        if int(number) <= 2:  # pytest's capturing turns them to and fro
            continue
        try:
            target = os.readlink(FDS / number)
        except OSError:
            continue  # the one that listed the directory
        # Plain files are left to ResourceWarning: libraries keep some open on purpose (random devices, data files).
        if target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/shm/")):
            found[f"fd:{number}:{target}"] = f"descriptor {number} ({target})"
    return found


def _listening(key: str) -> str:
    kind, _, number = key.partition(":")
    number, _, target = number.partition(":")
    if kind != "fd" or not target.startswith("socket:"):
        return ""
    for connection in psutil.Process().net_connections("inet"):
        if connection.fd == int(number):
            return f", {connection.status} {connection.laddr}"
    return ", local"


def _threads() -> dict[str, str]:
    return {
        # Those of asyncio.to_thread end with their loop, which a module may share.
        f"{'executor' if t.name.startswith('asyncio_') else 'thread'}:{t.ident}": f"thread {t.name}"
        for t in threading.enumerate()
        if not t.daemon and t.is_alive()
    }


def _shm_names() -> list[str]:
    return os.listdir(SHM) if SHM.exists() else []


def _shm_of_others() -> set[str]:
    """Names in ``/dev/shm`` that a process which these tests did not start has mapped or open."""
    names: set[str] = set()
    ours = {os.getpid(), *(int(key.split(":")[1]) for key in _processes())}
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        try:
            paths = [entry.path for entry in (*process.memory_maps(), *process.open_files())]
        except (psutil.Error, OSError):
            continue
        names.update(Path(path).name for path in paths if path.startswith(f"{SHM}/"))
    return names
