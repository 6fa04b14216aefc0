"""What the operator does when there is much to do: in which order, what it puts off, and what it never does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from simulated_cluster import KEY, SimulatedCluster

from drumline_operator.apps import PROGRESS_SETTLES, Apps
from drumline_operator.cluster import Unavailable
from drumline_operator.events import Events
from drumline_operator.pace import Pace
from drumline_operator.reconcile import Load, Outcome, reconcile
from drumline_operator.settings import OperatorSettings
from drumline_operator.store import Change, Store
from drumline_operator.trimmed import keep
from drumline_operator.workqueue import WorkQueue


class Busy(Load):
    """Other keys are due; progress is told after so many seconds."""

    def __init__(self, told: float = 0.0) -> None:
        self.told = told

    def others_wait(self) -> bool:
        return True

    def turn(self) -> float:
        return self.told

    def until_told(self) -> float:
        return self.told


class Paced(Busy):
    """Other keys are due; progress is told at a real pace, one a second."""

    def __init__(self) -> None:
        self.pace = Pace(rate=1, burst=1)

    def turn(self) -> float:
        return self.pace.turn(KEY, 100.0)

    def until_told(self) -> float:
        return self.pace.wait(KEY, 100.0)


async def run(cluster: SimulatedCluster, load: Load) -> Outcome:
    return await reconcile(KEY, cluster, lambda: cluster.now, OperatorSettings(), load)


def kinds(cluster: SimulatedCluster) -> list[str]:
    return sorted(kind for kind, _ in cluster.objects if kind != "DistributedApp")


async def test_a_new_app_gives_way_between_its_stages() -> None:
    cluster = SimulatedCluster()
    cluster.create_app()
    assert (await run(cluster, Busy())).again == 0
    assert kinds(cluster) == ["PodDisruptionBudget", "Service"]
    assert (await run(cluster, Busy())).again == 0
    assert kinds(cluster) == ["Deployment", "PodDisruptionBudget", "Service"]
    assert "status" not in cluster.app
    assert cluster.events == [("Created", "Service, PodDisruptionBudget made"), ("Created", "Deployment made")]
    await run(cluster, Busy())
    assert cluster.app["status"]["summary"] == "0/1"
    assert (await run(cluster, Busy())).actions == 0


async def test_a_change_of_an_app_gives_way_to_nobody() -> None:
    cluster = SimulatedCluster()
    cluster.create_app()
    await run(cluster, Load())
    assert len(cluster.events) == 1
    cluster.edit(replicas=3)
    await run(cluster, Busy())
    assert cluster.objects["Deployment", "sdxl"]["spec"]["replicas"] == 3
    assert cluster.app["status"]["observedGeneration"] == 2


async def test_progress_is_put_off_and_verdicts_are_not() -> None:
    cluster = SimulatedCluster()
    cluster.create_app()
    assert (await run(cluster, Busy(told=7.0))).again == 0
    assert (await run(cluster, Busy(told=5.0))).again == 5, "a run in between would only learn when to come again"
    outcome = await run(cluster, Busy(told=7.0))
    assert (outcome.again, "status" in cluster.app) == (7.0, False)
    assert len(cluster.events) == 2
    for _ in range(20):
        cluster.tick()
    await run(cluster, Busy(told=7.0))
    assert cluster.app["status"]["summary"] == "1/1"
    assert cluster.events[-1][0] == "Serving"
    other = SimulatedCluster()
    other.create_app(image="")
    await run(other, Busy(told=7.0))
    assert other.app["status"]["conditions"][0]["reason"] == "InvalidSpec"


# --- pace


async def test_a_run_that_gives_way_does_not_use_up_the_time_to_tell() -> None:
    cluster, load = SimulatedCluster(), Paced()
    cluster.create_app()
    for _ in range(2):
        assert (await run(cluster, load)).again == 0
    await run(cluster, load)
    assert cluster.app["status"]["summary"] == "0/1"


def test_a_few_tell_at_once_and_the_rest_one_after_the_other() -> None:
    pace = Pace(rate=2, burst=3)
    waits = [pace.wait(key, 100.0) for key in "abcdef"]
    assert waits[:3] == [0, 0, 0]
    assert waits[3:] == [0.5, 1.0, 1.5]
    assert pace.wait("e", 100.5) == pace.left("e", 100.5) == 0.5
    assert pace.wait("e", 101.0) == pace.left("e", 101.0) == 0
    pace.forget("f")
    assert pace.left("f", 100.0) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 3)), min_size=1))
def test_never_more_than_the_rate_and_each_in_its_turn(story: list[tuple[str, float]]) -> None:
    pace, now, told = Pace(rate=2, burst=3), 0.0, list[float]()
    promised: dict[str, float] = {}
    for key, later in story:
        now += later
        wait = pace.wait(key, now)
        if wait == 0:
            told.append(now)
            promised.pop(key, None)
        else:
            assert promised.setdefault(key, now + wait) >= now + wait - 1e-6
    for at in told:
        assert (
            sum(at - 1 < each <= at for each in told) <= 3 + 2 + 4
        )  # burst, rate, and times given out that passed unused


# --- what waits


def pod(version: int, phase: str, ready: str = "False", **meta: Any) -> bytes:
    head = {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": str(version), **meta}
    head["labels"] = {"drumline.dev/app": "sdxl"}
    return json.dumps(
        {"metadata": head, "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}}
    ).encode()


def test_what_only_tells_of_progress_settles_first() -> None:
    told: list[Change] = []
    store = Store(told.append)
    apps = Apps(store)
    for text in (pod(1, "Pending"), pod(2, "Running"), pod(3, "Running", "True"), pod(4, "Failed", "True")):
        store.seen("Pod", text)
    store.seen("Pod", pod(5, "Failed", "True", deletionTimestamp="2026-01-01T00:00:00Z"))
    store.gone("Pod", pod(6, "Failed", "True"))
    waits = [after for change in told for key, after in apps.concerned(change)]
    assert waits == [PROGRESS_SETTLES, PROGRESS_SETTLES, 0, PROGRESS_SETTLES, 0, 0]


def test_the_steps_of_a_rollout_are_no_change_of_a_deployment() -> None:
    def deployment(*conditions: Mapping[str, str]) -> bytes:
        status = {"observedGeneration": len(conditions), "conditions": conditions}
        return json.dumps({"metadata": {"name": "a", "generation": 1}, "spec": {}, "status": status}).encode()

    going = {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}
    revised = json.loads(deployment())
    revised["metadata"]["annotations"] = {"deployment.kubernetes.io/revision": "1"}
    texts = (deployment(), deployment(going), deployment(going, going))
    assert len({keep("Deployment", text).data for text in texts}) == 1
    assert b"revision" not in keep("Deployment", json.dumps(revised).encode()).data
    for trouble in ({**going, "status": "False"}, {"type": "ReplicaFailure", "status": "True", "message": "quota"}):
        kept = json.loads(keep("Deployment", deployment(going, trouble)).data)
        assert [each["type"] for each in kept["status"]["conditions"]] == [trouble["type"]]
        assert kept["status"]["observedGeneration"] == 2


async def test_a_key_that_gives_way_comes_behind_what_is_due() -> None:
    ran: list[str] = []
    done = asyncio.Event()

    async def handle(key: str) -> float | None:
        ran.append(key)
        waits = queue.others_wait()
        if len(ran) == 6:
            done.set()
        return 0.0 if waits and ran.count(key) < 2 else -1

    queue = WorkQueue(handle, workers=1)
    for key in "abc":
        queue.add(key)
    idle = asyncio.create_task(queue.idle())
    task = asyncio.create_task(queue.run())
    async with asyncio.timeout(4):
        await done.wait()
        await idle
    task.cancel()
    await asyncio.wait([task])
    assert ran == ["a", "b", "c", "a", "b", "c"]


# --- events


class Board:
    """Where events are posted."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, str]] = []
        self.news, self.free = asyncio.Event(), asyncio.Event()
        self.fails = 0

    async def post(self, raw: Mapping[str, Any], type: str, reason: str, message: str, at: datetime) -> None:
        assert set(raw) == {"apiVersion", "kind", "metadata"}
        assert at.tzinfo is not None
        if self.fails:
            self.fails -= 1
            raise Unavailable("no")
        self.posted.append((raw["metadata"]["name"], message))
        self.news.set()

    async def idle(self) -> None:
        await self.free.wait()


def subject(name: str) -> dict[str, Any]:
    return {"apiVersion": "v", "kind": "k", "metadata": {"name": name, "uid": name, "labels": {}}, "spec": {}}


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_events_wait_for_a_quiet_moment_and_one_reason_is_one_event() -> None:
    board = Board()
    events = Events(board.post, board.idle)
    task = asyncio.create_task(events.run())
    events.add(subject("a"), "Normal", "Created", "Service made")
    events.add(subject("b"), "Normal", "Created", "Service made")
    events.add(subject("a"), "Normal", "Created", "Deployment made")
    events.add(subject("a"), "Normal", "Created", "Deployment made")
    await asyncio.sleep(0)
    assert board.posted == []
    board.fails = 1  # the first is lost, and stops nothing
    board.free.set()
    async with asyncio.timeout(4):
        await board.news.wait()
    assert board.posted == [("b", "Service made")]
    events.add(subject("a"), "Normal", "Created", "Service made")
    events.add(subject("a"), "Normal", "Created", "Deployment made")
    await ended(task)  # what is left is posted at the end
    assert board.posted[1:] == [("a", "Service made; Deployment made")]


async def test_events_do_not_wait_for_ever_and_are_not_kept_without_bound() -> None:
    board = Board()
    events = Events(board.post, board.idle, longest=0.0, most=2)
    for name in "abc":
        events.add(subject(name), "Normal", "Created", "made")
    task = asyncio.create_task(events.run())
    async with asyncio.timeout(4):
        await board.news.wait()
    await ended(task)
    assert [name for name, _ in board.posted] == ["b", "c"]
