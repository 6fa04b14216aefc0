"""Ranks that die, stop, hang or raise, at any time: a typed error that names the right one, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from drumline import codec
from drumline.api.manifests import load_manifest, to_settings
from drumline.contract import RunnerSettings
from drumline.distributed import DistributedRunner
from drumline.errors import DrumlineError, EncodingError, NotReady, RankHung, RankLost, SetupFailed, WorkerError
from drumline.host import build_service
from drumline.runner.runner import RestartPolicy
from drumline.runner.status import FailureStatus
from drumline.testing.workers import Fails

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: A caller whose rank was lost knows within this many seconds.
LOST_SECONDS = 2.0
HANG_TIMEOUT = 1.0
HUNG_SECONDS = HANG_TIMEOUT + 1
COLLECTIVE_SECONDS = 3
ENDLESS = RestartPolicy(max_restarts=10_000, backoff_seconds=0)

WAYS = ["kill", "_exit", "segfault", "stop"]


@pytest.fixture(autouse=True)
def nothing_left(nothing_more_left: None) -> None:
    """The group is shared, and restarted by most tests."""


@pytest.fixture(scope="module")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written here (``RANK HOW``) happens in the next setup."""
    return tmp_path_factory.mktemp("fuse") / "fuse"


def make(**changes: Any) -> DistributedRunner:
    options = {"hang_timeout": HANG_TIMEOUT, "cancel_grace": 0.3, "restart": ENDLESS, **changes}
    return DistributedRunner(Fails, world_size=2, device="cpu", **options)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared group keeps its files."""
    return tmp_path_factory.mktemp("temporary")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(fuse: Path, temporary: Path) -> AsyncIterator[DistributedRunner]:
    runner = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        async with asyncio.timeout(50):
            await runner.start(fuse=str(fuse), collective=True)
    yield runner
    await runner.stop()


def light(fuse: Path, rank: int, how: str) -> None:
    fuse.write_text(f"{rank} {how}")


async def fails(awaitable: Any, kind: type[DrumlineError] | tuple[type[DrumlineError], ...], seconds: float) -> Any:
    """The error with which ``awaitable`` fails within ``seconds``."""
    async with asyncio.timeout(seconds):
        with pytest.raises(kind) as caught:
            await awaitable
    return caught.value


def check_lost(error: DrumlineError, how: str, rank: int) -> None:
    if how == "stop":
        assert isinstance(error, RankHung)
        assert f"rank {rank} was stopped by a signal" in str(error) or f"rank {rank} made no progress" in str(error)
    else:
        assert isinstance(error, RankLost)
        codes = {"kill": (None, signal.SIGKILL), "_exit": (9, None), "segfault": (None, signal.SIGSEGV)}
        assert (error.exit_code, error.signal) == codes[how]
    assert error.rank == rank


def last_failure(group: DistributedRunner) -> FailureStatus:
    failure = group.status.last_failure
    assert failure is not None
    return failure


async def serves(group: DistributedRunner) -> None:
    assert (await group.invoke({"collective": True, "tag": "fine"}, timeout=20))["tag"] == "fine"


def pid_of(group: DistributedRunner, rank: int) -> int:
    pid = group.status.ranks[rank].pid
    assert pid is not None
    return pid


# -- during requests


@pytest.mark.parametrize("phase", ["invoke", "stream"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", WAYS)
async def test_a_rank_lost_during_a_request(group: DistributedRunner, how: str, rank: int, phase: str) -> None:
    payload = {"how": how, "rank": rank, "collective": True, "updates": 3, "tag": "lost"}
    before = group.status.restarts
    doomed = group.submit(payload, streaming=phase == "stream")
    waiting = [group.submit({"collective": True, "tag": f"waited {n}"}) for n in range(2)]
    error = await fails(doomed.result(), DrumlineError, HUNG_SECONDS if how == "stop" else LOST_SECONDS)
    check_lost(error, how, rank)
    updates = [codec.unpack(update.data, update.buffers) async for update in doomed.updates()]
    assert updates == [{"number": n, "tag": "lost"} for n in range(len(updates))]
    assert len(updates) == 3 or rank == 1 or phase == "invoke"  # what rank 0 sent before its death has arrived
    assert doomed.outcome == ("rank-hung" if how == "stop" else "rank-lost")
    for number, ticket in enumerate(waiting):
        packed = await asyncio.wait_for(ticket.result(), 20)
        assert codec.unpack(packed.data, packed.buffers)["tag"] == f"waited {number}"
    assert group.status.restarts == before + 1
    assert last_failure(group).rank == rank


async def test_a_payload_for_which_there_is_no_descriptor(group: DistributedRunner) -> None:
    """No rank has seen anything of it: it ends at once, the ranks go on, and so does whoever waited behind it."""
    pids = [pid_of(group, rank) for rank in (0, 1)]
    busy = group.submit({"collective": True, "tag": "before"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        large = group.submit({"tag": "x" * (4 << 20)})  # more than any before, whose memory would do
        behind = group.submit({"collective": True, "tag": "behind"})
        await asyncio.wait_for(busy.result(), 20)
        error = await fails(large.result(), EncodingError, 20)
        packed = await asyncio.wait_for(behind.result(), 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "the payload cannot be handed to the ranks: [Errno 24]" in str(error)
    assert codec.unpack(packed.data, packed.buffers)["tag"] == "behind"
    assert (await group.invoke({"tag": "x" * (1 << 20)}, timeout=20))["tag"] == "x" * (1 << 20)
    assert pids == [pid_of(group, rank) for rank in (0, 1)]


async def test_a_payload_in_the_hands_of_a_killed_rank_ends_with_its_group(group: DistributedRunner) -> None:
    def held() -> int:
        files = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return sum("memfd:payload" in os.readlink(file) for file in files if os.path.islink(file))

    for size in (1 << 20, 300 << 10):
        await fails(group.invoke({"how": "kill", "rank": 1, "tag": "a" * size}), RankLost, LOST_SECONDS)
        for length in (size, size // 2):  # into memory of the new group's own, used again
            assert (await group.invoke({"tag": "b" * length}, timeout=20))["tag"] == "b" * length
        assert held() == 1


async def test_all_ranks_lost_at_once_are_one_failure(group: DistributedRunner) -> None:
    before = group.status.restarts
    error = await fails(group.invoke({"how": "kill", "rank": -1}), RankLost, LOST_SECONDS)
    assert error.rank in (0, 1)
    assert error.signal == signal.SIGKILL
    await serves(group)
    assert group.status.restarts == before + 1


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_hanging_rank_is_named_with_stacks(group: DistributedRunner, rank: int) -> None:
    error = await fails(group.invoke({"how": "hang", "rank": rank, "collective": True}), RankHung, HUNG_SECONDS)
    assert error.rank == rank
    assert set(error.stacks) == {0, 1}
    assert "in fail" in error.stacks[rank]
    assert "barrier" in error.stacks[1 - rank]
    assert last_failure(group).stacks == error.stacks
    await serves(group)


async def test_a_rank_that_hangs_after_the_other_has_returned(group: DistributedRunner) -> None:
    error = await fails(group.invoke({"how": "hang", "rank": 1}), RankHung, HUNG_SECONDS)
    assert error.rank == 1
    await serves(group)


# -- collectives


@pytest.mark.asyncio(loop_scope="function")
async def test_a_collective_has_a_bound(tmp_path: Path) -> None:
    """``communication.timeoutSeconds`` of a manifest, through the container's environment, to the ranks' process group."""
    manifest = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "bounded"},
        "spec": {
            "workerClass": "drumline.testing.workers:Fails",
            "numGPUs": 0,
            "worldSize": 2,
            "communication": {"timeoutSeconds": COLLECTIVE_SECONDS},
            "env": [{"name": "DRUMLINE_CANCEL_GRACE", "value": "0.3"}],
        },
    }
    file = tmp_path / "app.yaml"
    file.write_text(json.dumps(manifest))
    service = build_service(RunnerSettings.from_env(to_settings(load_manifest(file)).to_env()))
    runner = service.runner
    assert isinstance(runner, DistributedRunner)
    async with asyncio.timeout(50), runner:
        error = await fails(
            runner.invoke({"how": "hang", "rank": 1, "collective": True}), WorkerError, COLLECTIVE_SECONDS + 10
        )
        assert error.rank == 0
        assert f"{COLLECTIVE_SECONDS}000ms" in error.message
        assert "barrier" in error.remote_traceback
        await serves(runner)


# -- exceptions


@pytest.mark.parametrize("rank", [0, 1])
async def test_one_rank_raises_before_a_collective(group: DistributedRunner, rank: int) -> None:
    payload = {"how": "raise", "rank": rank, "collective": True}
    doomed, waiting = group.submit(payload), group.submit({"collective": True})
    error = await fails(doomed.result(), WorkerError, LOST_SECONDS)
    assert (error.rank, error.exception_type) == (rank, "drumline.testing.workers.WorkerExploded")
    assert error.message == "exploded on purpose"
    assert "in fail" in error.remote_traceback
    await asyncio.wait_for(waiting.result(), 20)


@pytest.mark.parametrize("rank", [0, 1, -1])
async def test_an_exception_outside_of_collectives_costs_no_restart(group: DistributedRunner, rank: int) -> None:
    await serves(group)
    before = group.status.restarts
    error = await fails(group.invoke({"how": "raise", "rank": rank}), WorkerError, LOST_SECONDS)
    assert error.rank == rank or rank == -1
    await serves(group)
    assert group.status.restarts == before


async def test_connection_errors_of_its_peers_are_not_reported_as_the_cause(group: DistributedRunner) -> None:
    """While the ranks' parent is stopped it cannot tell of the death; what the peer says about it comes first."""
    await serves(group)
    nursery = psutil.Process(pid_of(group, 0)).parent()
    assert nursery is not None
    for rank in (0, 1):
        nursery.suspend()
        before = group.status.version
        doomed = group.submit({"how": "kill", "rank": rank, "collective": True})
        await group.wait_status(before, 5)  # the peer's error: the request is to be stopped
        nursery.resume()
        assert not doomed.done
        check_lost(await fails(doomed.result(), RankLost, LOST_SECONDS), "kill", rank)
        await serves(group)


# -- while idle


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_lost_while_idle_is_replaced_unasked(
    group: DistributedRunner, until: Any, rank: int, number: signal.Signals
) -> None:
    await serves(group)
    before = group.status.restarts
    os.kill(pid_of(group, rank), number)
    bound = HUNG_SECONDS if number == signal.SIGSTOP else LOST_SECONDS
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", bound)
    failure = last_failure(group)
    assert failure.rank == rank
    assert failure.signal == (None if number == signal.SIGSTOP else number)
    await serves(group)
    assert group.status.restarts == before + 1


async def test_a_request_to_a_stopped_rank(group: DistributedRunner) -> None:
    os.kill(pid_of(group, 1), signal.SIGSTOP)
    doomed, waiting = group.submit({"collective": True}), group.submit({"collective": True})
    check_lost(await fails(doomed.result(), RankHung, HUNG_SECONDS), "stop", 1)
    await asyncio.wait_for(waiting.result(), 20)


async def test_a_rank_that_is_continued_in_time_goes_on(group: DistributedRunner, until: Any) -> None:
    await serves(group)
    before = group.status.restarts
    os.kill(pid_of(group, 1), signal.SIGSTOP)
    await until(group, lambda status: status.ranks[1].state == "paused", LOST_SECONDS)
    ticket = group.submit({"collective": True})
    os.kill(pid_of(group, 1), signal.SIGCONT)
    await asyncio.wait_for(ticket.result(), 5)
    # Its parent tells of the rank's going on, which may take longer than the rank's answer.
    await until(group, lambda status: status.ranks[1].state == "ready", LOST_SECONDS)
    assert group.status.restarts == before


# -- while the group restarts


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [*WAYS, "raise"])
async def test_a_rank_lost_in_the_setup_of_a_restart(group: DistributedRunner, fuse: Path, how: str, rank: int) -> None:
    await serves(group)
    before = group.status.restarts
    light(fuse, rank, how)
    os.kill(pid_of(group, 0), signal.SIGKILL)
    waiting = None
    async with asyncio.timeout(20):
        while waiting is None:  # the first ones may meet the killed rank
            ticket = group.submit({"collective": True})
            try:
                await ticket.result()
                waiting = ticket
            except RankLost as error:
                assert error.rank == 0
    assert group.status.restarts == before + 2
    failure = last_failure(group)
    assert failure.rank == rank
    expected = {"stop": "RankHung", "raise": "SetupFailed", "_exit": "Exited"}.get(how, "Killed")
    assert failure.reason == expected
    if how == "raise":
        assert failure.exception_type.endswith("WorkerExploded")
        assert "in fail" in failure.traceback


async def test_a_setup_that_does_not_return_names_the_rank_that_holds_the_others_up(
    group: DistributedRunner, fuse: Path, until: Any
) -> None:
    await serves(group)
    before = group.status.restarts
    assert group._engine is not None
    plan = group._engine.plan
    patient, plan.startup_timeout = plan.startup_timeout, 0.5  # start() with so little would meet the import of torch
    try:
        light(fuse, 1, "hang")
        os.kill(pid_of(group, 0), signal.SIGKILL)
        await until(group, lambda status: status.restarts == before + 2, 10)
    finally:
        plan.startup_timeout = patient
    failure = last_failure(group)
    assert (failure.reason, failure.rank) == ("SetupFailed", 1)
    assert "setup() did not return within 0.5 s on rank 0, 1" in failure.message
    assert "in fail" in failure.traceback
    await serves(group)


# -- the nursery


async def child_of(group: DistributedRunner, rank: int) -> psutil.Process:
    await group.invoke({"how": "child", "rank": rank})
    [child] = psutil.Process(pid_of(group, rank)).children()
    return child


@pytest.mark.parametrize("busy", [False, True])
async def test_the_ranks_parent_is_killed(group: DistributedRunner, until: Any, busy: bool) -> None:
    child = await child_of(group, 1)
    before = group.status.restarts
    nursery = psutil.Process(pid_of(group, 0)).parent()
    assert nursery is not None
    doomed = group.submit({"how": "hang"}) if busy else None
    nursery.kill()
    if doomed is not None:
        error = await fails(doomed.result(), RankLost, LOST_SECONDS)
        assert (error.rank, error.reason) == (-1, "ParentLost")
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", 30)
    assert psutil.wait_procs([child], timeout=5)[1] == []
    await serves(group)


async def test_the_ranks_parent_is_to_blame_although_their_ends_are_seen_first(
    group: DistributedRunner, until: Any
) -> None:
    before = group.status.restarts
    nursery = psutil.Process(pid_of(group, 0)).parent()
    assert nursery is not None
    assert group._engine is not None
    assert group._engine.incarnation is not None
    nursery.kill()
    for rank in range(group.world_size):  # no real process can be made to show both ends in this order
        group._engine.incarnation._channel_closed(rank)
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", 30)
    failure = group.status.last_failure
    assert failure is not None
    assert (failure.rank, failure.reason) == (-1, "ParentLost")
    await serves(group)


async def test_children_of_a_rank_go_with_it(group: DistributedRunner, until: Any) -> None:
    child = await child_of(group, 1)
    before = group.status.restarts
    os.kill(pid_of(group, 1), signal.SIGKILL)
    await until(group, lambda status: status.restarts == before + 1 and status.state == "ready", 30)
    assert psutil.wait_procs([child], timeout=5)[1] == []


# -- the first start


async def test_starts_that_fail_say_why() -> None:
    runners = {case: make() for case in [("raise", 1), ("raise", 0), ("kill", 0), ("stop", 1)]}
    starts = {
        (how, rank): asyncio.create_task(runner.start(fail_rank=rank, how=how, collective=True))
        for (how, rank), runner in runners.items()
    }
    await asyncio.sleep(0)
    early = {case: runner.submit({}) for case, runner in runners.items()}
    async with asyncio.timeout(50):
        await asyncio.wait(starts.values())
    for (how, rank), runner in runners.items():
        error = starts[how, rank].exception()
        assert isinstance(error, DrumlineError)
        if how == "raise":
            assert isinstance(error, SetupFailed)
            assert (error.rank, error.message) == (rank, "exploded on purpose")
            assert "WorkerExploded" in error.exception_type
            assert "in fail" in error.remote_traceback
            assert last_failure(runner).traceback == error.remote_traceback
        else:
            check_lost(error, how, rank)
        status = runner.status
        assert (status.state, status.ready_ranks, status.restarts) == ("failed", 0, 0)
        assert last_failure(runner).rank == rank
        with pytest.raises(type(error)):
            await early[how, rank].result()
        with pytest.raises(NotReady, match="failed after"):
            await runner.invoke()
        await runner.stop()
    again = runners["raise", 1]
    async with asyncio.timeout(50):
        await again.start()
        await serves(again)
        await again.stop()


# -- teardown


async def test_ranks_that_fail_in_their_teardown() -> None:
    cases = [("kill", 1), ("raise", 0), ("stop", 1), ("hang", 0)]
    runners = [make() for _ in cases]
    async with asyncio.timeout(50):
        await asyncio.gather(
            *(
                runner.start(teardown=how, teardown_rank=rank)
                for runner, (how, rank) in zip(runners, cases, strict=True)
            )
        )
    for runner, (how, rank) in zip(runners, cases, strict=True):
        error = await fails(runner.stop(timeout=1.5), DrumlineError, HUNG_SECONDS + 1)
        if how == "raise":
            assert isinstance(error, WorkerError)
            assert error.message == "exploded on purpose"
        elif how == "hang":
            assert isinstance(error, RankLost)
            assert str(error) == f"teardown() did not end in time on rank {rank}"
        else:
            check_lost(error, how, rank)
        assert error.rank == rank  # type: ignore[union-attr]
        assert runner.status.state == "stopped"
        await runner.stop()


async def test_a_restart_leaves_no_file_of_the_ranks_before(group: DistributedRunner, temporary: Path) -> None:
    for _ in range(2):
        await fails(group.invoke({"how": "kill", "rank": 1}), RankLost, LOST_SECONDS)
        await serves(group)
    files = [file for _, _, names in os.walk(temporary) for file in names]
    assert len(files) == 1, "where the ranks meet, for those of now"


# -- the budget


async def test_a_used_up_restart_budget_fails_everybody_and_start_works_again(until: Any) -> None:
    runner = make(restart=RestartPolicy(max_restarts=1, backoff_seconds=0))
    async with asyncio.timeout(50):
        await runner.start()
        await fails(runner.invoke({"how": "kill", "rank": 1}), RankLost, LOST_SECONDS)
        await serves(runner)
        doomed, waiting = runner.submit({"how": "_exit", "rank": 1}), runner.submit({})
        first = await fails(doomed.result(), RankLost, LOST_SECONDS)
        second = await fails(waiting.result(), RankLost, LOST_SECONDS)
        assert (first.rank, first.exit_code) == (second.rank, second.exit_code) == (1, 9)
        await until(runner, lambda status: status.state == "failed")
        assert not runner.is_alive()
        with pytest.raises(NotReady, match="failed after: rank 1 was lost"):
            await runner.invoke()
        await runner.start()
        await serves(runner)
        os.kill(pid_of(runner, 0), signal.SIGKILL)
        await until(runner, lambda status: status.restarts == 1)
        await runner.stop()  # right after a crash
        assert runner.status.state == "stopped"
        await runner.stop()
