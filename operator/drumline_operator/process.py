"""The operator's process: watches fill the store, what changes wakes keys, the leader's workers run them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from drumline_operator.apps import Apps
from drumline_operator.cached import CachedCluster
from drumline_operator.cluster import Throttled
from drumline_operator.election import Election
from drumline_operator.endpoints import Health, serving
from drumline_operator.events import Events
from drumline_operator.handlers import KINDS, Versions, Watch
from drumline_operator.kube import KubeCluster, credentials
from drumline_operator.leader import Candidate
from drumline_operator.machine_types import MACHINE_TYPE_PREFIX
from drumline_operator.metrics import Metrics
from drumline_operator.pace import Pace
from drumline_operator.reconcile import Load, reconcile
from drumline_operator.runner_client import RunnerClient
from drumline_operator.runners import Runners
from drumline_operator.settings import OperatorSettings, ProcessSettings
from drumline_operator.store import Change, Store
from drumline_operator.trimmed import whole
from drumline_operator.watches import Watches
from drumline_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)


class Process:
    """Everything that runs.

    Args:
        operator: what the operator makes.
        process: how it runs.
    """

    def __init__(self, operator: OperatorSettings, process: ProcessSettings) -> None:
        self._operator, self._settings = operator, process
        self._store = Store(self._changed)
        self._apps = Apps(self._store)
        self._queue = WorkQueue(
            self._reconcile, retry_after=_retry_after, workers=process.workers, resync=process.resync
        )
        self._metrics = Metrics(self._depth, lambda: self._apps, lambda: self._watches.ages(_now()))
        self._kube = KubeCluster(timeout=process.request_timeout, wrote=self._metrics.wrote)
        self._http = RunnerClient()
        self._pace = Pace()
        self._events = Events(self._kube.event, self._queue.idle)
        self._watches = Watches(self._kube, self._store, process.watch_namespaces, nodes=process.watch_nodes)
        self._watch = Watch(credentials, self._seen, process.watch_namespaces)
        self._runners = Runners(self._http, self._news)
        self._cluster = CachedCluster(
            self._kube,
            self._store,
            runner=self._runners.said,
            tell=self._events.add,
            watched=self._watches.watched,
            refused=self._watches.refused,
            clock=_now,
        )
        self._owners: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set.

        Raises:
            ConfigurationError: there is no API server to be found, or the port cannot be used.
        """
        health = Health(alive=list, ready=lambda: [*self._watches.missing(), *self._watch.wrong()])
        serve = serving(self._settings.address, health, self._metrics.registry)
        async with self._kube, self._http, serve as port:
            log.info("drumline-operator %s serves port %d", self._operator.version, port)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._events.run(), name="events"),
                    group.create_task(self._watches.run(), name="watches"),
                    group.create_task(self._watch_apps(), name="watch apps"),
                    group.create_task(self._take_part(), name="election"),
                ]
                await stop.wait()
                log.info("asked to end")
                for task in tasks:
                    task.cancel()

    async def _watch_apps(self) -> None:
        await self._watches.list_custom()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run(), name="kopf")
            group.create_task(self._watch.supervise(self._known, self._watches.list_custom), name="supervise kopf")
            while True:
                await asyncio.sleep(self._settings.relist)
                await self._watches.list_custom()

    def _known(self) -> Versions:
        return {kind: {each.uid: each.version for each in self._store.all(kind)} for kind in KINDS.values()}

    async def _take_part(self) -> None:
        await self._watches.synced()
        log.info("all is seen: %d apps", self._store.count("DistributedApp"))
        if not self._settings.leader_election:
            await self._lead()
            return
        identity = self._settings.identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
        candidate = Candidate(identity, int(self._settings.lease_duration), self._settings.renew_deadline)
        election = Election(
            self._kube,
            candidate,
            namespace=self._operator.namespace,
            name=self._settings.lease_name,
            retry_period=self._settings.retry_period,
            work=self._lead,
        )
        await election.run()

    async def _lead(self) -> None:
        """Work on everything; what another leader did or left undone is looked at, too."""
        self._metrics.leader.set(1)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._runners.run(), name="runners")
                await asyncio.sleep(0)  # until it has begun
                for pod in self._store.all("Pod"):
                    self._owners[pod.uid] = f"{pod.namespace}/{pod.app}"
                    self._runners.pod(pod.uid, whole("Pod", pod))
                for each in self._store.all("DistributedApp"):
                    self._queue.add(f"{each.namespace}/{each.name}")
                for each in self._store.all("MachineType"):
                    self._queue.add(f"{MACHINE_TYPE_PREFIX}{each.name}")
                await self._queue.run()
        finally:
            self._metrics.leader.set(0)

    async def _reconcile(self, key: str) -> float | None:
        with self._metrics.duration.time():
            load = _Load(key, self._queue, self._pace)
            try:
                outcome = await reconcile(key, self._cluster, lambda: datetime.now(UTC), self._operator, load)
            except Exception:
                self._metrics.reconciles.labels("error").inc()
                raise
        if outcome.gone:
            self._pace.forget(key)
        self._metrics.reconciles.labels("gone" if outcome.gone else "success").inc()
        return -1.0 if outcome.gone else outcome.again

    def _changed(self, change: Change) -> None:
        """A watch has shown something new."""
        for key, after in self._apps.concerned(change):
            self._queue.add(key, max(after, self._pace.left(key, _now())) if after else 0.0)
        if change.new is None:
            gone = change.any
            self._cluster.doubted(gone.namespace, gone.name if change.kind == "DistributedApp" else gone.app)
        if change.kind == "Pod":
            self._pod_changed(change)
        elif any(kept and b'"configMap"' in kept.data for kept in (change.old, change.new)):
            self._watches.want_sources({each.namespace for each in self._apps if each.config_map})

    def _pod_changed(self, change: Change) -> None:
        if change.old is not None and (change.new is None or change.new.uid != change.old.uid):
            self._runners.pod(change.old.uid, None)
            self._owners.pop(change.old.uid, None)
        if change.new is not None:
            self._owners[change.new.uid] = f"{change.new.namespace}/{change.new.app}"
            self._runners.pod(change.new.uid, whole("Pod", change.new))

    def _news(self, uid: str) -> None:
        """A runner has said something new."""
        if uid in self._owners:
            self._queue.add(self._owners[uid])

    def _seen(self, kind: str, type: str, raw: Mapping[str, Any]) -> None:
        """Kopf has shown something."""
        for each in self._watches.custom:
            if each.kind == kind:
                each.heard = _now()
        text = msgspec.json.encode(raw)
        if type == "DELETED":
            self._store.gone(kind, text)
        else:
            if kind == "DistributedApp" and type:
                meta = raw["metadata"]
                self._cluster.shown(meta["namespace"], meta["name"], meta["uid"])
            self._store.seen(kind, text)

    def _depth(self) -> int:
        return self._queue.schedule.ready(_now())


class _Load(Load):
    """What else the queue has to do beside one key."""

    def __init__(self, key: str, queue: WorkQueue, pace: Pace) -> None:
        self._key, self._queue, self._pace = key, queue, pace

    def others_wait(self) -> bool:
        return self._queue.others_wait()

    def turn(self) -> float:
        return self._pace.turn(self._key, _now())

    def until_told(self) -> float:
        return self._pace.wait(self._key, _now())


def _now() -> float:
    return asyncio.get_running_loop().time()


def _retry_after(error: Exception) -> float:
    return error.retry_after if isinstance(error, Throttled) else 0.0
