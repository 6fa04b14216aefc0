"""The operator and a real API server with a proxy between that breaks calls: it gets there, and makes nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.cluster.envtest import EnvTest
from fault_proxy import Act, Call, Cut, Delay, Drop, Fault, FaultProxy, Refuse, Storm
from kubelets import Kubelets
from tests.handlers.harness import RUNS, Operator, Start, until
from yarl import URL

from drumline_operator.actions import Action, RequeueAfter
from drumline_operator.cluster import ClusterError
from drumline_operator.kube import KubeCluster, configured
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.plan import plan
from drumline_operator.reconcile import Outcome, observe, reconcile
from drumline_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(namespace="default")
#: Seconds after which a call counts as lost: little, so that delays are noticed.
CALL_SECONDS = 2.0
KINDS = (*API_VERSIONS, "DistributedApp")


def app(namespace: str, name: str = "sdxl", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"workerClass": "app:Worker", "image": "a:1", "numGPUs": 0, **spec},
    }


@pytest.fixture
async def proxy(server: EnvTest, tmp_path: Path) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.kubeconfig, tmp_path) as found:
        yield found


@pytest.fixture
async def kubelets(server: EnvTest, namespace: str) -> AsyncIterator[Kubelets]:
    """Pods for the Deployments of the test's namespace."""
    async with KubeCluster(await configured(server.kubeconfig)) as own:
        found = Kubelets(own, namespace)
        task = asyncio.create_task(found.run())
        yield found
        if task.done():
            task.result()  # it only ends by an error
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def to_do(cluster: KubeCluster, namespace: str, name: str) -> list[Action]:
    """Return what there is to do about an app that exists."""
    raw = await cluster.get("DistributedApp", namespace, name)
    assert raw is not None
    left = plan(raw, await observe(raw, cluster), datetime.now(UTC), SETTINGS)
    return [action for action in left if not isinstance(action, RequeueAfter)]


async def check(cluster: KubeCluster, namespace: str, *names: str) -> None:
    """Each app has its children, one of each kind and no others, and there is nothing left to do."""
    expected: set[tuple[str, str]] = set()
    for name in names:
        raw = await cluster.get("DistributedApp", namespace, name)
        assert raw is not None
        assert await to_do(cluster, namespace, name) == []
        closed = raw["spec"].get("networkPolicy") == "DenyAllIngress"
        expected |= {(kind, name) for kind in KINDS if kind != "NetworkPolicy" or closed}
        for kind in API_VERSIONS:
            child = await cluster.get(kind, namespace, name)
            if child is not None:
                assert [owner["uid"] for owner in child["metadata"]["ownerReferences"]] == [raw["metadata"]["uid"]]
    found = [(kind, each["metadata"]["name"]) for kind in KINDS for each in await cluster.list(kind, namespace)]
    assert sorted(found) == sorted(expected)


# --- the proxy itself


@pytest.mark.parametrize("turns", range(5))
async def test_a_proxy_that_closes_while_somebody_connects_leaves_no_socket_open(
    turns: int, server: EnvTest, tmp_path: Path
) -> None:
    """After so many turns of the event loop the connection waits, or is being accepted, or is the server's."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        async with FaultProxy(server.kubeconfig, tmp_path) as proxy:
            url = URL(yaml.safe_load(proxy.kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
            connection = socket.create_connection((url.host, url.port))
            for _ in range(turns):
                await asyncio.sleep(0)
        connection.close()
        gc.collect()
    assert [str(each.message) for each in seen] == []


# --- one fault at each call in turn


async def brought_home(name: str, namespace: str, through: KubeCluster) -> int:
    """Reconcile until there is nothing left to do; return the number of runs."""
    for run in itertools.count(1):
        assert run < 10, "it does not come to rest"
        with contextlib.suppress(ClusterError):
            outcome: Outcome = await reconcile(f"{namespace}/{name}", through, lambda: datetime.now(UTC), SETTINGS)
            if outcome.actions == 0:
                return run
    raise AssertionError


#: The delay is longer than a call may take: the operator has gone on when the API server hears of it.
ONCE: dict[str, Fault] = {
    "dropped before": Drop(),
    "dropped after": Drop(done=True),
    "answer cut": Cut(20),
    "conflict": Refuse(409),
    "throttled": Refuse(429, retry_after=1),
    "error": Refuse(500),
    "unavailable": Refuse(503),
    "gateway": Refuse(504),
    "late": Delay(CALL_SECONDS * 1.5),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ONCE)
async def test_one_fault_at_each_call_in_turn(
    kind: str, proxy: FaultProxy, cluster: KubeCluster, namespace: str
) -> None:
    late = isinstance(ONCE[kind], Delay)
    limit = {"timeout": CALL_SECONDS} if late else {}  # a call that is late by itself is another fault
    async with KubeCluster(await configured(proxy.kubeconfig), **limit) as through:
        await cluster.apply(app(namespace, "calm", networkPolicy="DenyAllIngress"))
        await brought_home("calm", namespace, through)
        total = len(proxy.calls)
        assert total > 15
        # A late call takes its time, so every fourth has to do.
        chosen = range(0, total, 4 if late else 1)
        for number in chosen:
            name = f"app-{number}"
            await cluster.apply(app(namespace, name, networkPolicy="DenyAllIngress"))
            begin = len(proxy.calls)
            proxy.plan = lambda call, at=begin + number: ONCE[kind] if call.number == at else None
            await brought_home(name, namespace, through)
            proxy.plan = None
        # What is late may come in still: no write of an earlier run undoes one of a later run.
        await proxy.quiet()
        for number in chosen:
            await brought_home(f"app-{number}", namespace, through)
        assert len(proxy.faults) == len(chosen)
        before = proxy.writes
        for number in chosen:
            await brought_home(f"app-{number}", namespace, through)
        assert proxy.writes == before
    await check(cluster, namespace, "calm", *(f"app-{number}" for number in chosen))


# --- the operator as a process

PROCESS = {"RESYNC": 0.5, "RELIST": 2, "REQUEST_TIMEOUT": 5}


def served(**spec: Any) -> Callable[[Any], bool]:
    """Whether an app is served as its present spec says."""

    def holds(raw: Any) -> bool:
        status = (raw or {}).get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or ()}
        if raw is None or any(raw["spec"].get(key) != value for key, value in spec.items()):
            return False
        ready, progressing = conditions.get("Ready", {}), conditions.get("Progressing", {})
        wanted = "Suspended" if raw["spec"].get("suspend") else "Serving"
        current = status.get("observedGeneration") == raw["metadata"]["generation"]
        return bool(current and ready.get("reason") == wanted and progressing.get("reason") == "Complete")

    return holds


async def wait(operator: Operator, cluster: KubeCluster, namespace: str, **wanted: dict[str, Any]) -> None:
    """Return when each app is served as it is wanted; says what it is like when that takes too long."""
    for name, spec in wanted.items():
        try:
            await until(cluster, "DistributedApp", namespace, name, served(**spec), seconds=60)
        except TimeoutError:
            raw = await cluster.get("DistributedApp", namespace, name)
            pods = await cluster.list("Pod", namespace)
            said = "\n".join(str(line) for line in operator.lines[-40:])
            pytest.fail(f"{name} is not served: {raw}\n{[pod['status'] for pod in pods]}\n{said}")


async def done(operator: Operator, cluster: KubeCluster, namespace: str, *names: str) -> None:
    """Return when there is nothing to do about any app.

    A served app may still have to tell of its old pods, which go, and what failed last waits for its next try.
    """
    for name in names:
        async with asyncio.timeout(60):
            while True:
                before = await operator.metric(RUNS)
                if not await to_do(cluster, namespace, name):
                    break
                await operator.runs(1, since=before)


async def at_rest(operator: Operator, proxy: FaultProxy, cluster: KubeCluster, namespace: str, *names: str) -> None:
    """Return when there is nothing to do, and the operator, though it looks at every app again and again, writes nothing."""
    async with asyncio.timeout(60):
        await proxy.all_watched()
    await done(operator, cluster, namespace, *names)
    for _ in range(5):
        before = proxy.writes
        await operator.runs(4 * len(names))
        if proxy.writes == before:
            return
    pytest.fail(f"it does not come to rest: {[call for call in proxy.calls if call.write][before - 4 :]}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
async def test_a_storm(
    seed: int, start: Start, proxy: FaultProxy, kubelets: Kubelets, cluster: KubeCluster, namespace: str
) -> None:
    """Three calls of ten go wrong, from the first one on, while apps are made, changed, suspended and replaced."""
    storm = Storm(seed, rate=0.3)
    proxy.plan = storm
    operator = await start(kubeconfig=proxy.kubeconfig, WATCH_NAMESPACES=namespace, **PROCESS)
    names = ["one", "two", "three", "four"]
    for name in names:
        await cluster.apply(app(namespace, name))
    await wait(operator, cluster, namespace, one={}, two={}, three={}, four={})
    await cluster.apply(app(namespace, "one", image="a:2", replicas=3))
    await cluster.apply(app(namespace, "two", suspend=True, networkPolicy="DenyAllIngress"))
    old = await cluster.get("DistributedApp", namespace, "three")
    assert old is not None
    await cluster.delete("DistributedApp", namespace, "three", old["metadata"]["uid"])
    await cluster.apply(app(namespace, "three", image="a:3"))
    live = await cluster.get("Service", namespace, "four")
    assert live is not None
    await cluster.delete("Service", namespace, "four", live["metadata"]["uid"])
    changed = {"one": {"image": "a:2", "replicas": 3}, "two": {"suspend": True}, "three": {"image": "a:3"}, "four": {}}
    await wait(operator, cluster, namespace, **changed)
    await until(cluster, "Service", namespace, "four", bool, seconds=60)
    storm.rate = 0
    assert len(proxy.faults) > 10
    assert len({type(fault) for _, fault in proxy.faults}) >= 3
    await at_rest(operator, proxy, cluster, namespace, *names)
    await check(cluster, namespace, *names)


@pytest.mark.timeout(300)
async def test_watches_that_break_in_the_middle_of_an_event(
    start: Start, proxy: FaultProxy, kubelets: Kubelets, cluster: KubeCluster, namespace: str
) -> None:
    """No event is lost, though every watch ends after some bytes, mostly within a line."""
    lengths = itertools.cycle([10, 5000, 9000, 20000, 40000])
    proxy.plan = lambda call: Cut(next(lengths)) if call.watch else None
    operator = await start(kubeconfig=proxy.kubeconfig, WATCH_NAMESPACES=namespace, **{**PROCESS, "RESYNC": 1000})
    await cluster.apply(app(namespace))
    for replicas in (1, 3, 2, 4):
        await cluster.apply(app(namespace, replicas=replicas))
        await wait(operator, cluster, namespace, sdxl={"replicas": replicas})
    assert sum(isinstance(fault, Cut) for _, fault in proxy.faults) > 10
    proxy.plan = None
    await done(operator, cluster, namespace, "sdxl")
    assert await operator.stop() == 0
    await check(cluster, namespace, "sdxl")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("story", ["made", "changed"])
async def test_killed_at_every_write_in_turn(
    story: str,
    start: Start,
    proxy: FaultProxy,
    kubelets: Kubelets,
    cluster: KubeCluster,
    namespace: str,
) -> None:
    """SIGKILL after the 1st, 2nd, 3rd ... write since its start, until a life has fewer; each begins with news.

    Events and Leases count, too. Nothing else changes what an operator leaves behind, so this is every call: a death at a
    read, or before a write was done, leaves what the write before it has left, and one before the first leaves the news.
    """
    names = [] if story == "made" else ["sdxl"]
    for number in itertools.count():
        if story == "made":
            names.append(f"sdxl-{number}")
        spec = {"image": f"a:{number}", "replicas": 1 + number % 2, "networkPolicy": "DenyAllIngress"}
        operator: asyncio.Future[Operator] = asyncio.get_running_loop().create_future()

        async def kill(operator: asyncio.Future[Operator] = operator) -> None:
            await (await operator).stop(signal.SIGKILL)

        proxy.plan = _at_write(number, Act(kill, done=True))
        await cluster.apply(app(namespace, names[-1], **spec))
        alive = await start(kubeconfig=proxy.kubeconfig, WATCH_NAMESPACES=namespace, **PROCESS)
        operator.set_result(alive)
        ended = asyncio.create_task(alive.process.wait())
        home = asyncio.create_task(
            until(cluster, "DistributedApp", namespace, names[-1], served(image=f"a:{number}"), seconds=60)
        )
        await asyncio.wait([ended, home], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await home
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
            break
        home.cancel()
        await asyncio.gather(home, return_exceptions=True)
    # What is surely written before the app is served: its children, and a status that says that it is not.
    assert number >= {"made": 5, "changed": 2}[story]
    proxy.plan = None
    # The kill may have come a moment after the app was served: the end is looked at with one that nothing kills.
    await alive.stop(signal.SIGKILL)
    last = await start(kubeconfig=proxy.kubeconfig, WATCH_NAMESPACES=namespace, **PROCESS)
    for name in names:
        await until(cluster, "DistributedApp", namespace, name, served(), seconds=60)
    await at_rest(last, proxy, cluster, namespace, *names)
    await check(cluster, namespace, *names)


def _at_write(number: int, fault: Fault) -> Callable[[Call], Fault | None]:
    """Break the call that is this write, counted from the next call on."""
    writes = itertools.count()
    return lambda call: fault if call.method != "GET" and next(writes) == number else None
