"""The operator's process: watches fill the store, what changes wakes keys, workers run them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry

from drumline_operator.apps import Apps
from drumline_operator.cluster import Throttled
from drumline_operator.endpoints import Health, serving
from drumline_operator.handlers import Watch
from drumline_operator.kube import KubeCluster, credentials
from drumline_operator.manifests import labels
from drumline_operator.reconcile import reconcile
from drumline_operator.reflector import Reflector
from drumline_operator.settings import OperatorSettings, ProcessSettings
from drumline_operator.store import Change, Store
from drumline_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

#: What belongs to apps; the API server leaves out what does not carry this label.
OWNED: Final = ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Pod")


class Process:
    """Everything that runs.

    Args:
        operator: what the operator makes.
        process: how it runs.
    """

    def __init__(self, operator: OperatorSettings, process: ProcessSettings) -> None:
        self._operator, self._settings = operator, process
        self.registry = CollectorRegistry()
        self._kube = KubeCluster(timeout=process.request_timeout)
        self.store = Store(self._changed)
        self.apps = Apps(self.store)
        self.queue = WorkQueue(
            self._reconcile, retry_after=_retry_after, workers=process.workers, resync=process.resync
        )
        places: tuple[str | None, ...] = process.watch_namespaces or (None,)
        self._lists = [
            Reflector(self._kube, self.store, kind, namespace)
            for kind in ("MachineType", "DistributedApp")
            for namespace in (places if kind == "DistributedApp" else (None,))
        ]
        self._reflectors = [
            Reflector(self._kube, self.store, kind, namespace, labels.APP) for kind in OWNED for namespace in places
        ]
        if process.watch_nodes:
            self._reflectors.append(Reflector(self._kube, self.store, "Node", optional=True))

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set.

        Raises:
            ConfigurationError: there is no API server to be found, or the port cannot be used.
        """
        health = Health(alive=list, ready=self._not_ready)
        async with self._kube, serving(self._settings.address, health, self.registry) as port:
            log.info("drumline-operator %s serves port %d", self._operator.version, port)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._work(), name="work"),
                    *(group.create_task(each.run(), name=f"watch {each.kind}") for each in self._reflectors),
                    group.create_task(self._watch_apps(), name="watch apps"),
                ]
                await stop.wait()
                for task in tasks:
                    task.cancel()

    async def _watch_apps(self) -> None:
        """List both kinds of our own, have kopf watch them, and list them again from time to time.

        kopf lists anew by itself when its watch was too old, but never tells what has gone meanwhile.
        """
        for each in self._lists:
            await each.list_until_done()
        watch = Watch(credentials, self._seen, self._settings.watch_namespaces)
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.run(), name="kopf")
            while True:
                await asyncio.sleep(self._settings.relist)
                for each in self._lists:
                    await each.list_until_done()

    async def _work(self) -> None:
        for each in (*self._lists, *self._reflectors):
            await each.synced.wait()
        log.info("all is seen: %d apps", self.store.count("DistributedApp"))
        await self.queue.run()

    async def _reconcile(self, key: str) -> float | None:
        outcome = await reconcile(key, self._kube, lambda: datetime.now(UTC), self._operator)
        return -1.0 if outcome.gone else outcome.again

    def _changed(self, change: Change) -> None:
        for key, after in self.apps.concerned(change):
            self.queue.add(key, after)

    def _seen(self, kind: str, type: str, raw: Mapping[str, Any]) -> None:
        text = msgspec.json.encode(raw)
        if type == "DELETED":
            self.store.gone(kind, text)
        else:
            self.store.seen(kind, text)

    def _not_ready(self) -> list[str]:
        return [f"{each.kind} not seen yet" for each in (*self._lists, *self._reflectors) if not each.synced.is_set()]


def _retry_after(error: Exception) -> float:
    return error.retry_after if isinstance(error, Throttled) else 0.0
