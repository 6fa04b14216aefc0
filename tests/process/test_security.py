"""Nobody else can talk to a rank or read what it shares with its runner."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner
from drumline.testing.workers import Echo

pytestmark = pytest.mark.asyncio(loop_scope="module")


def private_directories() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("drumline-*"))


def unix_sockets(pid: int | str) -> set[str]:
    """The inodes of the Unix sockets that a process holds."""
    inodes = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    links = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # the one that lists the directory
            links.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return {link[8:-1] for link in links if link.startswith("socket:[") and link[8:-1] in inodes}


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[DistributedRunner]:
    runner = DistributedRunner(Echo, world_size=3, device="cpu")
    async with asyncio.timeout(50):
        await runner.start()
    yield runner
    await runner.stop()
    assert private_directories() == []


def pids(group: DistributedRunner) -> list[int]:
    return [rank.pid for rank in group.status.ranks if rank.pid is not None]


async def test_the_private_directory_is_private(group: DistributedRunner) -> None:
    [directory] = private_directories()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert directory.stat().st_uid == os.getuid()
    assert any(name.startswith("store-") for name in os.listdir(directory))


@pytest.mark.linux
async def test_each_rank_holds_its_own_end_of_its_own_channel_only(group: DistributedRunner) -> None:
    held = [unix_sockets(pid) for pid in pids(group)]
    assert [len(sockets) for sockets in held] == [1, 1, 1]
    assert len(set.union(*held)) == 3
    assert not set.union(*held) & unix_sockets("self")


@pytest.mark.linux
async def test_channels_have_no_name(group: DistributedRunner) -> None:
    """A socket with a path or an abstract name could be connected to by others."""
    await group.invoke({"x": 1})
    for pid in [*pids(group), psutil.Process(pids(group)[0]).ppid()]:
        assert [c.laddr for c in psutil.Process(pid).net_connections("unix") if c.laddr] == []


async def test_shared_memory_has_no_name(group: DistributedRunner) -> None:
    before = shared_memory()
    result = await group.invoke({"x": bytes(1 << 20)})
    assert len(result["x"]) == 1 << 20
    assert shared_memory() <= before
