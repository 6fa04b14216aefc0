"""Start and stop of groups: again, in time, from a script that forgets to, from one that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from drumline.distributed import DistributedRunner
from drumline.errors import NotReady, RequestCancelled, SetupFailed
from drumline.runner.nursery_process import Asked, start_early
from drumline.runner.observer import Observer
from drumline.runner.ticket import Ticket
from drumline.testing.workers import AsyncEcho, Facts


def drawn(result: dict[str, Any]) -> list[float]:
    return [number for rank in result["ranks"] for number in rank["drawn"]]


@pytest.mark.parametrize("asked", [None, str(os.cpu_count())])
async def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    """With a thread per core on every rank they wait for each other's threads in each operation."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    async with asyncio.timeout(50), DistributedRunner(Facts, world_size=2, device="cpu") as runner:
        share = max(1, (os.cpu_count() or 1) // 2) if asked is None else int(asked)
        assert [rank["threads"] for rank in (await runner.invoke())["ranks"]] == [share] * 2


async def test_stopped_twice_started_again_and_restarted_the_random_numbers_are_new(tmp_path: Path, until: Any) -> None:
    runner = DistributedRunner(Facts, world_size=2, device="cpu", cwd=tmp_path)
    assert runner.status.state == "new"
    with pytest.raises(NotReady, match=r"call start\(\)"):
        await runner.invoke()
    await runner.stop()
    async with asyncio.timeout(50):
        await runner.start(model="first")
        first = await runner.invoke()
        assert [rank["cwd"] for rank in first["ranks"]] == [str(tmp_path)] * 2
        victim = runner.status.ranks[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await until(runner, lambda status: status.restarts == 1 and status.state == "ready")
        restarted = await runner.invoke()
        await runner.stop()
        await runner.stop()
        assert runner.status.state == "stopped"
        assert [rank.state for rank in runner.status.ranks] == ["lost", "lost"]
        with pytest.raises(NotReady, match="stopped"):
            runner.ensure_alive()
        with pytest.raises(NotReady, match="stopped"):
            await runner.invoke()
        await runner.start(model="second")
        again = await runner.invoke()
        await runner.stop()
    assert first["ranks"][1]["kwargs"] == restarted["ranks"][1]["kwargs"] == {"model": "first"}
    assert again["ranks"][1]["kwargs"] == {"model": "second"}
    numbers = drawn(first) + drawn(restarted) + drawn(again)
    assert len(set(numbers)) == len(numbers)


class KeptAlive(Observer):
    def __init__(self) -> None:
        self.beats: list[str] = []
        self.thrice = asyncio.Event()

    def request_finished(self, ticket: Ticket) -> None:
        self.beats.append(f"{ticket.request_id} {ticket.outcome}")
        if len(self.beats) == 3:
            self.thrice.set()


async def test_a_life_with_coroutines(caplog: pytest.LogCaptureFixture) -> None:
    """setup(), __call__() and teardown() are coroutines; the context manager starts and stops; idle time is filled."""
    caplog.set_level("INFO", "drumline")
    options = {"keepalive_payload": {"still": "there"}, "keepalive_interval": 0.02}
    runner = DistributedRunner(AsyncEcho, world_size=2, device="cpu", **options)
    runner.observers.append(observer := KeptAlive())
    async with asyncio.timeout(50):
        async with runner:
            assert runner.is_alive()
            assert await runner.invoke({"a": 1}) == {"payload": {"a": 1}, "setup": {}}
            await observer.thrice.wait()
            assert observer.beats.count("keepalive ok") >= 2
        assert not runner.is_alive()
    said = [record for record in caplog.records if record.getMessage() == "torn down"]
    assert {record.__dict__["rank"] for record in said} == {0, 1}


def test_wrong_arguments_are_named() -> None:
    with pytest.warns(DeprecationWarning, match="set_device has no effect"):
        DistributedRunner(Facts, set_device=True)
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        DistributedRunner(Facts, world_size=0)


async def test_spawned_ranks_are_the_same_as_forked_ones(tmp_path: Path) -> None:
    runner = DistributedRunner(Facts, world_size=2, device="cpu", cwd=tmp_path, start_method="spawn")
    async with asyncio.timeout(55), runner:
        ranks = (await runner.invoke())["ranks"]
        assert [rank["rank"] for rank in ranks] == [0, 1]
        assert ranks[0]["parent"] == ranks[1]["parent"]
        assert all(rank["main_thread"] for rank in ranks)
        assert all(rank["cwd"] == str(tmp_path) for rank in ranks)
        assert all("drumline.rank" in psutil.Process(rank["pid"]).cmdline() for rank in ranks)
        assert len(set(drawn({"ranks": ranks}))) == 4


# -- what does not end by itself


@pytest.fixture
def stuck_import(tmp_path: Path) -> str:
    path = tmp_path / "stuck.py"
    path.write_text(
        "import time\nfrom drumline.distributed import DistributedWorker\nprint('importing', flush=True)\n"
        "time.sleep(3600)\nclass Stuck(DistributedWorker): ...\n"
    )
    return f"{path}:Stuck"


async def test_an_import_that_does_not_end_fails_the_start(stuck_import: str) -> None:
    runner = DistributedRunner(stuck_import, world_size=2, device="cpu")
    with pytest.raises(SetupFailed, match=r"importing the worker's module took longer than 0\.5 s") as caught:
        await runner.start(timeout=0.5)
    assert caught.value.rank == -1
    assert runner.status.state == "failed"
    assert runner.status.last_failure is not None
    assert not runner.is_alive()
    await runner.stop()


async def test_a_start_that_is_cancelled_leaves_nothing(stuck_import: str) -> None:
    runner = DistributedRunner(stuck_import, world_size=2, device="cpu")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await runner.start()
    assert runner.status.state == "stopped"


async def test_stop_during_a_start_ends_the_start(stuck_import: str) -> None:
    runner = DistributedRunner(stuck_import, world_size=2, device="cpu")
    starting = asyncio.create_task(runner.start())
    await asyncio.sleep(0)
    early = runner.submit({})
    await runner.stop()
    with pytest.raises(NotReady, match="stopped while it started"):
        await starting
    with pytest.raises(NotReady):
        await early.result()


# -- what imports before anything else is there


async def test_a_nursery_that_was_started_early_is_taken_over() -> None:
    runner = DistributedRunner("drumline.testing.workers:AsyncEcho", world_size=2, device="cpu")
    start_early(Asked("drumline.testing.workers:AsyncEcho"))
    start_early(Asked("drumline.testing.workers:AsyncEcho"))
    (early,) = [each for each in psutil.Process().children() if "drumline.rank.nursery" in each.cmdline()]
    await runner.start()
    ranks = [rank.pid for rank in runner.status.ranks]
    assert sorted(ranks) == sorted(each.pid for each in early.children())  # type: ignore[type-var]
    await runner.stop()


async def test_a_nursery_that_was_started_early_for_another_worker_is_not(stuck_import: str) -> None:
    script = f"""
        import asyncio
        from drumline.distributed import DistributedRunner
        from drumline.runner.nursery_process import Asked, start_early

        async def main():
            start_early(Asked({stuck_import!r}))
            async with DistributedRunner("drumline.testing.workers:AsyncEcho", device="cpu"):
                pass
        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(script))
    assert await asyncio.wait_for(process.wait(), 60) == 0  # and what was started early ends with it


async def test_a_server_that_cannot_listen_leaves_no_early_nursery(stuck_import: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "drumline", "run", stuck_import, "--port", str(taken.getsockname()[1])]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert b"cannot listen" in errors
    assert process.returncode == 2


async def test_a_working_directory_that_does_not_exist_is_named() -> None:
    runner = DistributedRunner(AsyncEcho, device="cpu", cwd="/nonexistent")
    with pytest.raises(SetupFailed, match="No such file or directory: '/nonexistent'"):
        await runner.start()
    await runner.stop()


BROKEN = {
    "raise SystemExit('no license')": "SystemExit: no license",
    "import nonexistent_module_xyz": "ModuleNotFoundError: No module named 'nonexistent_module_xyz'",
    "import os; os._exit(5)": "died; its output is in the log",
}


async def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    runners = []
    for number, source in enumerate(BROKEN):
        path = tmp_path / f"broken{number}.py"
        path.write_text(source + "\n")
        runners.append(DistributedRunner(f"{path}:Wrong", device="cpu"))
    results = await asyncio.gather(*(runner.start(timeout=50) for runner in runners), return_exceptions=True)
    for runner, result, text in zip(runners, results, BROKEN.values(), strict=True):
        assert isinstance(result, SetupFailed)
        assert result.rank == -1
        assert text in str(result)
        assert runner.status.last_failure is not None
        assert text in runner.status.last_failure.message
        await runner.stop()


# -- scripts

COUNTER = """
from drumline.distributed import DistributedWorker

class Counter(DistributedWorker):
    calls = 0

    def setup(self, **kwargs):
        print("set up", flush=True)

    def __call__(self, add: int = 1):
        self.calls += add
        return {"calls": self.calls, "version": VERSION}

VERSION = 1
"""

SCRIPT = """
import asyncio, json, sys
from drumline.distributed import DistributedRunner

runner = DistributedRunner("counter.py:Counter", world_size=2, device="cpu", warmup={"add": 5})

async def main(wait):
    await runner.start()
    result = await runner.invoke()
    pids = [runner.status.ranks[0].pid, runner.status.ranks[1].pid]
    loaded = [name for name in ("torch", "numpy", "PIL", "counter") if name in sys.modules]
    schema = runner.request_schema["properties"]["add"]
    print(json.dumps({"result": result, "pids": pids, "loaded": loaded, "schema": schema}), flush=True)
    if wait:
        await asyncio.Event().wait()

asyncio.run(main("wait" in sys.argv))
if "fail" in sys.argv:
    raise ValueError("the script failed")
"""


async def script(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    (folder / "counter.py").write_text(COUNTER)
    (folder / "script.py").write_text(SCRIPT)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "script.py",
        *arguments,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


def processes_of(told: dict[str, Any]) -> list[psutil.Process]:
    found = []
    for pid in told["pids"]:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


async def test_scripts_that_never_stop_their_runners_end_and_leave_nothing(tmp_path: Path) -> None:
    """Two processes with a group each on one host; one of them fails. Neither imports torch or the worker's module."""
    good, bad = await script(tmp_path), await script(tmp_path, "fail")
    async with asyncio.timeout(50):
        (out, err), (bad_out, bad_err) = await asyncio.gather(good.communicate(), bad.communicate())
    assert good.returncode == 0, err.decode()
    assert bad.returncode == 1
    assert b"the script failed" in bad_err
    assert b"Traceback" not in err
    told, bad_told = json.loads(out), json.loads(bad_out)
    assert told["result"] == bad_told["result"] == {"calls": 6, "version": 1}  # the warm-up came first
    assert told["loaded"] == []
    assert (told["schema"]["type"], told["schema"]["default"]) == ("integer", 1)
    assert not set(told["pids"]) & set(bad_told["pids"])
    assert processes_of(told) == processes_of(bad_told) == []
    assert b"set up" in err  # what ranks print is shown even where nobody configured logging


async def test_scripts_that_are_killed_leave_nothing(tmp_path: Path) -> None:
    numbers = [signal.SIGKILL, signal.SIGTERM]
    processes = [await script(tmp_path, "wait") for _ in numbers]
    for process, number in zip(processes, numbers, strict=True):
        assert process.stdout is not None
        async with asyncio.timeout(50):
            ranks = processes_of(json.loads(await process.stdout.readline()))
            assert len(ranks) == 2
            nursery = ranks[0].parent()
            assert nursery is not None
            process.send_signal(number)
            assert await process.wait() == -number
            await process.communicate()
        assert psutil.wait_procs([*ranks, nursery], timeout=5)[1] == []


async def test_a_script_that_is_killed_during_an_import_leaves_nothing(tmp_path: Path, stuck_import: str) -> None:
    code = f"""
        import asyncio
        from drumline.distributed import DistributedRunner
        asyncio.run(DistributedRunner({stuck_import!r}, device="cpu").start())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(50):
        while b"importing" not in await process.stderr.readline():
            assert process.returncode is None
        [nursery] = psutil.Process(process.pid).children()
        process.kill()
        await process.wait()
        await process.communicate()
    assert psutil.wait_procs([nursery], timeout=5)[1] == []


# -- new code


async def test_reload_imports_the_module_afresh_and_waiting_requests_get_the_new_code(tmp_path: Path) -> None:
    path = tmp_path / "counter.py"
    path.write_text(COUNTER)
    runner = DistributedRunner(f"{path}:Counter", device="cpu")
    async with asyncio.timeout(50), runner:
        assert await runner.invoke() == {"calls": 1, "version": 1}
        path.write_text(COUNTER.replace("VERSION = 1", "VERSION = 22"))
        running, waiting = runner.submit({}), runner.submit({})
        runner.reload()
        with pytest.raises(RequestCancelled, match="reloaded"):
            await running.result()
        await waiting.result()
        assert await runner.invoke() == {"calls": 2, "version": 22}
        assert runner.status.restarts == 0
