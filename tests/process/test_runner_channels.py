"""A runner behaves the same over both of its channels, and listens nowhere that nobody asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch

from drumline import codec
from drumline.distributed import DistributedRunner
from drumline.errors import ConfigurationError, RankLost, RequestCancelled, SetupFailed, WorkerError
from drumline.runner.runner import RestartPolicy
from drumline.testing.workers import Echo, Fails

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS = 55
# Linux has the whole of 127/8; elsewhere only the first address is there by itself.
ADDRESS = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
CHANNELS: dict[str, dict[str, Any]] = {"local": {}, "remote": {"worker_addr": ADDRESS}}
COMMON = {"device": "cpu", "restart": RestartPolicy(max_restarts=10, backoff_seconds=0)}

EVERYTHING = """
from drumline.testing.workers import Echo, Fails, Steps

class Everything(Fails):
    def __call__(self, streaming=False, do="", **payload):
        return {"echo": Echo, "steps": Steps, "fail": Fails}[do].__call__(self, streaming, **payload)
"""


def processes(runner: DistributedRunner) -> list[psutil.Process]:
    """This process, the nursery, the ranks."""
    found = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert {rank.pid for rank in runner.status.ranks} < {process.pid for process in found}
    assert len(found) >= 2 + runner.world_size
    return found


def listening(runner: DistributedRunner) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Addresses that the runner's own process, and its nursery and ranks, listen on."""
    mine, theirs = [], []
    for process in processes(runner):
        for connection in process.net_connections("inet"):
            bound = connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
            if bound:
                (mine if process.pid == os.getpid() else theirs).append((connection.laddr.ip, connection.laddr.port))
    return mine, theirs


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def running_loop() -> None:
    """The loop of this module is there before the first test, whichever that is."""


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The group is shared, and restarted by a test."""


@pytest.fixture(scope="module", params=CHANNELS)
def channel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def options(channel: str) -> dict[str, Any]:
    return {**COMMON, **CHANNELS[channel]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DistributedRunner]:
    path = tmp_path_factory.mktemp("everything") / "everything.py"
    path.write_text(EVERYTHING)
    async with DistributedRunner(f"{path}:Everything", 2, **options) as made:
        yield made


async def test_values_of_any_size_come_back_as_they_were(runner: DistributedRunner) -> None:
    async with asyncio.timeout(SECONDS):
        for size in (1, 1000, 100_000, 20 << 20):
            tensor = torch.arange(size, dtype=torch.uint8)
            payload = {"tensor": tensor, "text": "ż" * min(size, 1 << 20), "bytes": tensor.numpy().tobytes()}
            result = await runner.invoke({"do": "echo", **payload})
            assert torch.equal(result["tensor"], tensor)
            assert (result["text"], result["bytes"]) == (payload["text"], payload["bytes"])
            result["tensor"] += 1  # may be written
        kept = [(await runner.invoke({"do": "echo", "n": torch.full((50_000,), n)}))["n"] for n in range(20)]
        assert [set(tensor.tolist()) for tensor in kept] == [{n} for n in range(20)]


async def test_streams_are_complete_and_in_order(runner: DistributedRunner) -> None:
    async with asyncio.timeout(SECONDS):
        for steps in (1, 500):
            payload = {"do": "steps", "steps": steps, "tag": "t", "every_rank": True}
            events = [event async for event in runner.stream(payload)]
            for rank in (0, 1):
                assert [e["step"] for e in events[:-1] if e["rank"] == rank] == list(range(steps))
            assert events[-1]["steps"] == steps


async def test_a_cancelled_request_ends_on_all_ranks_at_the_same_step(runner: DistributedRunner) -> None:
    restarts = runner.status.restarts
    async with asyncio.timeout(SECONDS):
        for _ in range(10):
            ticket = runner.submit({"do": "steps", "steps": 100_000}, streaming=True)
            for _ in range(3):
                assert await ticket.next(None) is not None
            ticket.cancel()
            with pytest.raises(RequestCancelled):
                await ticket.result()
            assert len(set(ticket.stopped_steps.values())) == 1
            assert set(ticket.stopped_steps) == {0, 1}
    assert runner.status.restarts == restarts


async def test_an_error_of_any_rank_is_its_callers_and_the_next_request_is_served(runner: DistributedRunner) -> None:
    restarts = runner.status.restarts
    async with asyncio.timeout(SECONDS):
        for rank in (0, 1):
            payload = {"do": "fail", "how": "raise", "rank": rank, "updates": 20, "tag": "u"}
            ticket = runner.submit(payload, streaming=True)
            with pytest.raises(WorkerError, match="exploded on purpose") as caught:
                await ticket.result()
            assert caught.value.rank == rank
            assert caught.value.exception_type.endswith("WorkerExploded")
            updates = [codec.unpack(u.data, u.buffers)["number"] async for u in ticket.updates()]
            assert updates == list(range(len(updates)))
            assert rank == 1 or len(updates) == 20, "an error overtook updates"
            assert await runner.invoke({"do": "fail", "tag": "next"}) == {"ok": True, "tag": "next"}
    assert runner.status.restarts == restarts


async def test_nothing_listens_beyond_what_was_asked_for(runner: DistributedRunner, channel: str) -> None:
    await runner.invoke({"do": "steps", "steps": 2})
    mine, theirs = listening(runner)
    assert [ip for ip, _ in mine] == ([ADDRESS] if channel == "remote" else [])
    # gloo's own; the rendezvous is a file that only this user can reach.
    assert {ip for ip, _ in theirs} <= {"127.0.0.1", "::1"}
    for process in processes(runner):
        assert [c.laddr for c in process.net_connections("unix") if c.laddr] == []
    engine = runner._engine
    assert engine is not None
    assert engine._directory is not None
    assert os.stat(engine._directory).st_mode & 0o777 == 0o700


async def test_a_lost_rank_is_named_and_the_next_request_is_served(runner: DistributedRunner) -> None:
    restarts = runner.status.restarts
    async with asyncio.timeout(SECONDS):
        for rank, how, expected in [(1, "kill", (None, signal.SIGKILL)), (0, "_exit", (9, None))]:
            doomed = runner.submit({"do": "fail", "how": how, "rank": rank, "collective": True})
            waiting = runner.submit({"do": "fail", "tag": "waited"})
            with pytest.raises(RankLost) as caught:
                await asyncio.wait_for(doomed.result(), 2)
            assert (caught.value.rank, caught.value.exit_code, caught.value.signal) == (rank, *expected)
            packed = await waiting.result()
            assert codec.unpack(packed.data, packed.buffers)["tag"] == "waited"
    assert runner.status.restarts == restarts + 2


async def test_an_error_in_setup_is_told_before_the_rank_is_gone(options: dict[str, Any]) -> None:
    runner = DistributedRunner(Fails, 2, **options)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(SetupFailed, match="exploded on purpose") as caught:
            await runner.start(fail_rank=1, collective=True)
        assert caught.value.rank == 1
        assert "WorkerExploded" in caught.value.remote_traceback
        await runner.stop()


async def test_an_error_in_teardown_is_told_before_the_rank_is_gone(options: dict[str, Any]) -> None:
    runner = DistributedRunner(Fails, 2, **options)
    async with asyncio.timeout(SECONDS):
        await runner.start(teardown="raise", teardown_rank=1)
        with pytest.raises(WorkerError, match="exploded on purpose") as caught:
            await runner.stop()
        assert caught.value.rank == 1


LEAVES = """
import os, socket, time
from drumline.distributed import DistributedWorker

class Leaves(DistributedWorker):
    def setup(self):
        if os.path.exists(os.environ["LEAVES_BROKEN"]):
            raise EOFError("a truncated checkpoint")

    def __call__(self, streaming=False, leave=False):
        if leave:  # whatever connects this process to another
            for fd in map(int, os.listdir("/dev/fd")):
                try:
                    connection = socket.socket(fileno=os.dup(fd))
                    if connection.getpeername() or connection.family == socket.AF_UNIX:
                        connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            while True:
                time.sleep(3600)
        return {"stayed": True}
"""


@pytest.fixture
def leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.setenv("LEAVES_BROKEN", str(tmp_path / "broken"))
    return f"{tmp_path / 'leaves.py'}:Leaves"


async def test_a_rank_that_loses_its_channel_and_lives_on_is_lost(options: dict[str, Any], leaves: str) -> None:
    async with asyncio.timeout(SECONDS), DistributedRunner(leaves, 1, **options) as runner:
        pid = runner.status.ranks[0].pid
        with pytest.raises(RankLost, match="rank 0 was lost: connection closed"):
            await runner.invoke({"leave": True}, timeout=20)
        assert await runner.invoke({}) == {"stayed": True}
        assert runner.status.ranks[0].pid != pid


async def test_the_end_of_a_file_in_setup_is_not_the_end_of_the_runner(leaves: str, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    runner = DistributedRunner(leaves, 1, device="cpu")
    with pytest.raises(SetupFailed, match="EOFError: a truncated checkpoint"):
        await asyncio.wait_for(runner.start(), SECONDS)
    await runner.stop()


# -- the ZeroMQ channel's address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_a_port_that_was_asked_for_is_kept_over_restarts_and_belongs_to_one_runner() -> None:
    port = free_port()
    async with asyncio.timeout(SECONDS), DistributedRunner(Fails, 2, worker_port=port, **COMMON) as runner:
        for _ in range(3):
            with pytest.raises(RankLost):
                await runner.invoke({"how": "kill", "rank": 1, "collective": True})
            assert (await runner.invoke({"tag": "again"}))["tag"] == "again"
            assert listening(runner)[0].count(("127.0.0.1", port)) == 1
        second = DistributedRunner(Echo, 1, device="cpu", worker_port=port)
        with pytest.raises(ConfigurationError, match=f"worker_port: {port} is in use"):
            await second.start()
        await second.stop()
        assert (await runner.invoke({"tag": "still"}))["tag"] == "still"


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_keys_are_nowhere_that_others_can_read(method: str) -> None:
    async with (
        asyncio.timeout(SECONDS),
        DistributedRunner(Echo, 1, device="cpu", worker_addr="127.0.0.1", start_method=method) as runner,
    ):
        engine = runner._engine
        assert engine is not None
        assert engine.incarnation is not None
        secret = engine.incarnation.channel.rank_end(0).secret_key
        for process in processes(runner):
            text = "\0".join([*process.cmdline(), *process.environ().values()])
            assert secret not in text
        assert await runner.invoke({"fine": 1}) == {"fine": 1}
