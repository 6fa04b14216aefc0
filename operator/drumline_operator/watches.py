"""All that is watched with reflectors: what apps own, nodes, and the ConfigMaps of namespaces whose apps name one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from drumline_operator.manifests import labels
from drumline_operator.reflector import Reflector, Source
from drumline_operator.store import Store

#: What belongs to apps; the API server leaves out what does not carry this label.
OWNED: Final = ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Pod")


class Watches:
    """Reflectors.

    Args:
        source: the API server.
        store: gets what is seen.
        namespaces: of apps; empty: all.
        nodes: whether to watch nodes.
    """

    def __init__(self, source: Source, store: Store, namespaces: Sequence[str], *, nodes: bool) -> None:
        self._source, self._store = source, store
        places: tuple[str | None, ...] = tuple(namespaces) or (None,)
        #: Listed here, watched by kopf.
        self.custom = [
            *(Reflector(source, store, "DistributedApp", namespace) for namespace in places),
            Reflector(source, store, "MachineType"),
        ]
        self._fixed = [Reflector(source, store, kind, place, labels.APP) for kind in OWNED for place in places]
        self._nodes = Reflector(source, store, "Node", optional=True) if nodes else None
        if self._nodes is not None:
            self._fixed.append(self._nodes)
        self._sources: dict[str, tuple[Reflector, asyncio.Task[None]]] = {}
        self._group: asyncio.TaskGroup | None = None

    def __iter__(self) -> Iterator[Reflector]:
        yield from (*self.custom, *self._fixed, *(reflector for reflector, _ in self._sources.values()))

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for each in self._fixed:
                    group.create_task(each.run(), name=f"watch {each.kind}")
        finally:
            self._group = None
            self._sources.clear()

    async def list_custom(self) -> None:
        """List both kinds of our own, whatever it takes.

        kopf lists anew by itself when its watch was too old, but never tells what has gone meanwhile.
        """
        for each in self.custom:
            await each.list_until_done()

    async def synced(self) -> None:
        """Return when everything has been seen once."""
        for each in list(self):
            await each.synced.wait()

    def missing(self) -> list[str]:
        """Return the kinds that have not been seen yet."""
        return sorted({each.kind for each in self if not each.synced.is_set()})

    def watched(self, kind: str, namespace: str) -> bool:
        """Whether ConfigMaps of a namespace are watched, and have been seen."""
        assert kind == "ConfigMap"
        found = self._sources.get(namespace)
        return found is not None and found[0].synced.is_set() and not found[0].forbidden

    def refused(self, kind: str) -> bool:
        """Whether the API server does not show a kind, or nobody wants to see it."""
        return kind == "Node" and (self._nodes is None or self._nodes.forbidden)

    def want_sources(self, namespaces: Iterable[str]) -> None:
        """Watch ConfigMaps in exactly these namespaces: only their metadata, and only where an app names one."""
        wanted = set(namespaces)
        if self._group is None:
            return
        for namespace in self._sources.keys() - wanted:
            _, task = self._sources.pop(namespace)
            task.cancel()
            self._store.forget("ConfigMap", namespace)
        for namespace in wanted - self._sources.keys():
            reflector = Reflector(self._source, self._store, "ConfigMap", namespace, optional=True)
            task = self._group.create_task(reflector.run(), name=f"watch ConfigMap {namespace}")
            self._sources[namespace] = reflector, task

    def ages(self, now: float) -> Mapping[str, float]:
        """Return for each kind the seconds since the API server was last heard of; the longest where there are several."""
        ages: dict[str, float] = {}
        for each in self:
            if each.heard is not None:
                ages[each.kind] = max(ages.get(each.kind, 0.0), now - each.heard)
        return ages
