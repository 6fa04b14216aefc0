"""What is measured: one app on a real node, and many apps on nodes that only exist in the API."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.operator import apps
from bench.operator.api import Api, Follow, Object, path_of
from bench.operator.process import Operator, Usage
from bench.report import Row

#: Children of an app that has no NetworkPolicy.
CHILDREN = ("Deployment", "Service", "PodDisruptionBudget")
_ONE_SECONDS = 120.0
_MERGE = "application/merge-patch+json"
#: Long enough that one write in it would show, and that CPU time can be told from noise.
_IDLE_SECONDS, _QUICK_IDLE_SECONDS = 30.0, 10.0
_STILL_SECONDS = 2.0


class WrittenTo(Exception):
    """Something was written where nothing had to be."""


@dataclass(frozen=True)
class Bench:
    """Where it is measured.

    Attributes:
        api: the API server.
        kubeconfig: for the operator.
        address: of this machine, as the operator reaches it.
        image: of the pods that run.
        quick: a smaller slice.
        floor: also what a plain client takes for many apps.
    """

    api: Api
    kubeconfig: Path
    address: str
    image: str
    quick: bool
    floor: bool = True

    def limit(self, count: int) -> float:
        """Return a bound on what is done ``count`` times; generous, because machines are slow."""
        return 60.0 + 1.0 * count


# -- one app


async def one_app(bench: Bench, rounds: int) -> list[Row]:
    """Apply one app on a real node and change it, beside a plain client that does the same to a Deployment."""
    made = Row("one-deployment", "1 app: apply -> Deployment created", unit="ms")
    ready = Row("one-ready", "1 app: apply -> pod Ready, image present / plain client's Deployment")
    changed = Row("one-change", "1 app: spec change -> new pod Ready / plain client's change of a Deployment")
    async with Operator(bench.kubeconfig):
        for number in range(rounds):
            name = f"one-{number}"
            floor = await _plain(bench, name)
            ours = await _applied(bench, name)
            made.add(ours[0] * 1e3)
            ready.add(ours[1] / floor[0], ours_s=ours[1], floor_s=floor[0])
            changed.add(ours[2] / floor[1], ours_s=ours[2], floor_s=floor[1])
    return [made, ready, changed]


async def _applied(bench: Bench, name: str) -> tuple[float, float, float]:
    """Seconds until the Deployment is there, until the pod is ready, and until the change of the spec has a ready pod."""
    api, app = bench.api, apps.real_app(name, bench.image)
    async with (
        api.follow("Deployment", apps.NAMESPACE) as deployments,
        api.follow("Pod", apps.NAMESPACE, pod_ready, whole=True) as pods,
    ):
        began = time.perf_counter()
        await api.create(app)
        made = await deployments.until(lambda found: name in found.objects, f"Deployment of {name}", _ONE_SECONDS)
        ready = await pods.count(1, f"pod of {name}", _ONE_SECONDS)
        first = set(pods.matching)
        patch = {"spec": {"env": [{"name": "REVISION", "value": "2"}]}}
        again = time.perf_counter()
        await api.call("PATCH", path_of("DistributedApp", apps.NAMESPACE, name), patch, _MERGE)
        changed = await pods.until(lambda found: bool(found.matching - first), f"new pod of {name}", _ONE_SECONDS)
        await api.call("DELETE", path_of("DistributedApp", apps.NAMESPACE, name))
        await deployments.gone(f"Deployment of {name}", _ONE_SECONDS)
        await pods.gone(f"pods of {name}", _ONE_SECONDS)
    return made - began, ready - began, changed - again


async def _plain(bench: Bench, name: str) -> tuple[float, float]:
    """The same with a Deployment that a client makes itself."""
    api = bench.api
    made = apps.children(apps.real_app(name, bench.image, apps.FLOOR))
    async with api.follow("Pod", apps.FLOOR, pod_ready, whole=True) as pods:
        began = time.perf_counter()
        for child in made:
            await api.create(child)
        ready = await pods.count(1, f"plain pod of {name}", _ONE_SECONDS)
        first = set(pods.matching)
        container = {"name": "worker", "env": [{"name": "REVISION", "value": "2"}]}
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
        again = time.perf_counter()
        path = path_of("Deployment", apps.FLOOR, name)
        await api.call("PATCH", path, patch, "application/strategic-merge-patch+json")
        changed = await pods.until(lambda found: bool(found.matching - first), f"new plain pod of {name}", _ONE_SECONDS)
        for child in made:
            await api.call("DELETE", path_of(child["kind"], apps.FLOOR, name))
        await pods.gone(f"plain pods of {name}", _ONE_SECONDS)
    return ready - began, changed - again


def pod_ready(pod: Object) -> bool:
    """Whether a pod is ready, and not on its way out."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def app_ready(app: Object) -> bool:
    """Whether an app serves, by its condition."""
    conditions = (app.get("status") or {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["reason"] == "Serving" for each in conditions)


def established(definition: Object) -> bool:
    """Whether a CustomResourceDefinition is served."""
    conditions = (definition.get("status") or {}).get("conditions") or ()
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


# -- many apps


async def many_apps(bench: Bench, count: int) -> list[Row]:
    """Apply ``count`` apps, let them be, restart the operator; beside a plain client that makes their children."""
    goal = _goals(count)
    rows = {
        "made": Row(f"children-{count}", f"{count} apps applied -> all children created", goal(36), "s"),
        "ready": Row(f"ready-{count}", f"{count} apps applied -> all Ready", goal(80), "s"),
        "made-floor": Row(
            f"children-{count}-floor", f"{count} apps: children / a plain client that creates the same", None
        ),
        "ready-floor": Row(
            f"ready-{count}-floor", f"{count} apps: Ready / the pods of what the plain client created", None
        ),
        "restart": Row(f"restart-{count}", f"operator restarted with {count} apps -> steady", goal(15), "s"),
        "restart-writes": Row(f"restart-{count}-writes", "writes of that restart", 0, "writes"),
        "resync-writes": Row(f"resync-{count}-writes", f"resync of {count} apps: writes", 0, "writes"),
        "written": Row(f"written-{count}", f"writes until {count} apps are Ready, for each app", None, "writes"),
        "spent": Row(f"spent-{count}", "operator's CPU until then, for each app", None, "ms"),
        "gone": Row(f"gone-{count}", f"{count} apps deleted -> all children gone", None, "s"),
        **_usage_rows(count),
    }
    plain = await _plain_children(bench, count) if bench.floor else None
    async with Operator(bench.kubeconfig) as operator, _children(bench) as followed:
        before, used = await bench.api.writes(), operator.usage()
        began = time.perf_counter()
        async with bench.api.follow("DistributedApp", apps.NAMESPACE, app_ready, whole=True) as found:
            await bench.api.create_all(apps.fake_app(index, bench.address) for index in range(count))
            applied = time.perf_counter() - began
            each = [await kind.count(count, "children", bench.limit(count)) for kind in followed]
            made = max(each) - began
            ready = await found.count(count, "apps Ready", bench.limit(count)) - began
        rows["made"].add(made, applying_s=applied)
        rows["ready"].add(ready)
        if plain is not None:
            rows["made-floor"].add(made / plain[0], ours_s=made, floor_s=plain[0])
            rows["ready-floor"].add(ready / plain[1], ours_s=ready, floor_s=plain[1])
        rows["spent"].add((operator.usage().cpu - used.cpu) * 1e3 / count)
        await _still(bench)
        written = await bench.api.writes() - before
        del written["POST distributedapps"]
        parts = {f"{what.replace(' ', '_')}_n": number / count for what, number in sorted(written.items())}
        rows["written"].add(sum(written.values()) / count, **parts)
        await _idle(bench, operator, rows, count)
    before = await bench.api.writes()
    # Soon enough that the bench sees one, and not so soon that it begins before the restart is over.
    resync = 20.0 + 0.05 * count
    async with Operator(bench.kubeconfig, RESYNC=f"{resync}", PROGRESS_INTERVAL="3600") as operator:
        rows["restart"].add(await operator.reconciled(count, bench.limit(count)) - operator.started)
        rows["restart-writes"].add(sum((written := await bench.api.writes() - before).values()))
        _expect_none("the restart", written)
        await operator.reconciled(2 * count, bench.limit(count) + 2 * resync)
        rows["resync-writes"].add(sum((written := await bench.api.writes() - before).values()))
        _expect_none("the resync", written)
    rows["gone"].add(await _delete(bench, count))
    return [row for row in rows.values() if row.values]


async def idle_without_apps(bench: Bench) -> list[Row]:
    """Memory and CPU of an operator that has nothing to do."""
    rows = _usage_rows(0)
    async with Operator(bench.kubeconfig) as operator:
        await _idle(bench, operator, rows, 0)
    return list(rows.values())


def _goals(count: int) -> Callable[[float], float | None]:
    """Goals are for 1,000 apps; a smaller slice only informs."""
    return lambda seconds: seconds if count >= 1000 else None


def _usage_rows(count: int) -> dict[str, Row]:
    return {
        "rss": Row(f"rss-{count}", f"operator's memory, idle with {count} apps", _goals(count)(150), "MiB"),
        "cpu": Row(f"cpu-{count}", f"operator's CPU, idle with {count} apps", None, "% of a core"),
        "idle-writes": Row(f"idle-{count}-writes", f"idle with {count} apps: writes", 0, "writes"),
    }


async def _idle(bench: Bench, operator: Operator, rows: dict[str, Row], count: int) -> None:
    before, began = await bench.api.writes(), operator.usage()
    await asyncio.sleep(_QUICK_IDLE_SECONDS if bench.quick else _IDLE_SECONDS)  # the time that is measured
    ended = operator.usage()
    written = await bench.api.writes() - before
    rows["rss"].add(ended.rss)
    rows["cpu"].add(_cpu_percent(began, ended))
    rows["idle-writes"].add(sum(written.values()))
    _expect_none(f"{ended.at - began.at:.0f} s with {count} apps", written)


def _cpu_percent(began: Usage, ended: Usage) -> float:
    return 100 * (ended.cpu - began.cpu) / (ended.at - began.at)


def _expect_none(when: str, written: Counter[str]) -> None:
    if written:
        raise WrittenTo(f"{when}: {dict(written)} was written, and nothing had to be")


async def _still(bench: Bench) -> None:
    """Until nothing has been written for a while; the controllers of the cluster need longer than the operator."""
    before = await bench.api.writes()
    async with asyncio.timeout(bench.limit(0) * 5):
        while True:
            await asyncio.sleep(_STILL_SECONDS)  # nobody announces that nothing happens
            now = await bench.api.writes()
            if now == before:
                return
            before = now


@asynccontextmanager
async def _children(bench: Bench, namespace: str = apps.NAMESPACE) -> AsyncIterator[list[Follow]]:
    async with (
        bench.api.follow(CHILDREN[0], namespace) as first,
        bench.api.follow(CHILDREN[1], namespace) as second,
        bench.api.follow(CHILDREN[2], namespace) as third,
    ):
        yield [first, second, third]


async def _plain_children(bench: Bench, count: int) -> tuple[float, float]:
    """Seconds in which a plain client makes the same children, and in which their pods are ready. Removes them."""
    made: list[dict[str, Any]] = [
        child for index in range(count) for child in apps.children(apps.fake_app(index, bench.address, apps.FLOOR))
    ]
    async with bench.api.follow("Pod", apps.FLOOR, pod_ready, whole=True) as pods:
        began = time.perf_counter()
        await bench.api.create_all(made)
        created = time.perf_counter() - began
        ready = await pods.count(count, "plain pods", bench.limit(count)) - began
        async with _children(bench, apps.FLOOR) as followed:
            for kind in CHILDREN[:1] + CHILDREN[2:]:
                await bench.api.call("DELETE", path_of(kind, apps.FLOOR), {"propagationPolicy": "Background"})
            services = [path_of("Service", apps.FLOOR, name) for name in followed[1].objects]
            await bench.api.all(bench.api.call("DELETE", path) for path in services)  # cannot be deleted all at once
            for each in followed:
                await each.gone("plain children", bench.limit(count))
        await pods.gone("plain pods", bench.limit(count))
    await _still(bench)
    return created, ready


async def _delete(bench: Bench, count: int) -> float:
    """Delete all apps; seconds until the garbage collector has removed their children. No operator runs."""
    async with _children(bench) as followed, bench.api.follow("Pod", apps.NAMESPACE) as pods:
        began = time.perf_counter()
        await bench.api.call("DELETE", path_of("DistributedApp", apps.NAMESPACE), {"propagationPolicy": "Background"})
        for each in (*followed, pods):
            await each.gone("children of deleted apps", bench.limit(count))
        return time.perf_counter() - began
