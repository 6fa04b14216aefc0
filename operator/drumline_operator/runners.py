"""What the runners in pods say about their ranks: one long poll for each running pod, nothing at fixed intervals."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from drumline_operator.manifests.pod import WORKER_CONTAINER

log = logging.getLogger(__name__)

#: A runner whose requests come and go has news all the time; it is asked again no sooner than this.
_SHORTEST: Final = 1.0
#: Back-off for runners that do not answer; the last one also while they are loaded.
_BASE, _LONGEST = 1.0, 60.0
#: What of an answer matters here; the rest changes with every request.
_SHOWN: Final = ("state", "worldSize", "readyRanks", "restarts", "lastFailure")

Answer = Mapping[str, Any]


class Asker(Protocol):
    """Asks one runner."""

    async def runner_news(self, address: str, port: int, since: int | None) -> Answer | None:
        """Return the runner's status as soon as its version is not ``since``, or None when it does not answer."""
        ...


class Runners:
    """Long polls to the runners of pods.

    Args:
        asker: asks.
        changed: gets the uid of a pod whose runner says something new.
        shortest: seconds between two questions at least.
    """

    def __init__(self, asker: Asker, changed: Callable[[str], None], shortest: float = _SHORTEST) -> None:
        self._asker, self._changed, self._shortest = asker, changed, shortest
        self._tasks: dict[str, tuple[tuple[str, int], bool, asyncio.Task[None]]] = {}
        self._said: dict[str, Answer] = {}
        self._begun: dict[str, asyncio.Event] = {}
        #: Those whose first answer somebody waits for, who then need not be told.
        self._awaited: set[str] = set()
        self._group: asyncio.TaskGroup | None = None

    async def said(self, uid: str) -> Answer | None:
        """Return what the runner of a pod said last, or None.

        One that has just begun to be asked is waited for; its first question has a short limit. Otherwise a new leader would
        take out of every status what its predecessor has heard, and then put it back; and a pod that has become ready would
        serve with the ranks that it had a moment before.
        """
        if (begun := self._begun.get(uid)) is not None:
            self._awaited.add(uid)
            await begun.wait()
        return self._said.get(uid)

    async def run(self) -> None:
        """Ask until cancelled; pods are told by :meth:`pod` meanwhile."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await asyncio.get_running_loop().create_future()
        finally:
            self._group = None
            self._tasks.clear()
            self._said.clear()
            for uid in tuple(self._begun):
                self._answered(uid)

    def pod(self, uid: str, pod: Mapping[str, Any] | None) -> None:
        """A pod is as given, or gone (None). One that has become ready, or no longer is, has news: it is asked at once."""
        place = None if pod is None else place_of(pod)
        ready = pod is not None and is_ready(pod)
        known = self._tasks.get(uid)
        if known is not None and known[:2] != (place, ready):
            del self._tasks[uid]
            if known[0] != place:
                self._said.pop(uid, None)
            self._answered(uid)
            known[2].cancel()
            known = None
        if known is None and place is not None and self._group is not None:
            self._begun[uid] = asyncio.Event()
            task = self._group.create_task(self._ask(uid, *place), name=f"runner {uid}")
            self._tasks[uid] = place, ready, task

    async def _ask(self, uid: str, address: str, port: int) -> None:
        clock = asyncio.get_running_loop().time
        since: int | None = None
        failures = 0
        while True:
            began = clock()
            answer = await self._asker.runner_news(address, port, since)
            if answer is None:
                since = None
                self._keep(uid, None)
                pause = min(_LONGEST, _BASE * 2.0 ** min(failures, 16)) * random.uniform(0.8, 1.2)  # noqa: S311
                failures += 1
            else:
                version = answer.get("version")
                self._keep(uid, {name: answer.get(name) for name in _SHOWN})
                # One that does not wait for news answers at once with nothing new: it is left alone for longer.
                idle = version is None or (version == since and clock() - began < self._shortest)
                failures = failures + 1 if idle else 0
                since = version
                pause = min(_LONGEST, max(self._shortest, _BASE * 2.0 ** min(failures, 16) if idle else 0.0))
            self._answered(uid)
            await asyncio.sleep(max(0.0, began + pause - clock()))

    def _answered(self, uid: str) -> None:
        """Whoever waits for the first answer need not wait any longer."""
        if (begun := self._begun.pop(uid, None)) is not None:
            begun.set()
        self._awaited.discard(uid)

    def _keep(self, uid: str, answer: Answer | None) -> None:
        if self._said.get(uid) == answer:
            return
        if answer is None:
            del self._said[uid]
        else:
            self._said[uid] = answer
        if uid not in self._awaited:
            self._changed(uid)


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the kubelet says that a pod is ready."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)


def place_of(pod: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return address and port of the runner in a pod whose worker container runs, else None."""
    status = pod.get("status") or {}
    running = any(
        each.get("name") == WORKER_CONTAINER and "running" in (each.get("state") or {})
        for each in status.get("containerStatuses") or ()
    )
    ports = {
        port.get("name"): port.get("containerPort")
        for container in (pod.get("spec") or {}).get("containers") or ()
        if container.get("name") == WORKER_CONTAINER
        for port in container.get("ports") or ()
    }
    address, port = status.get("podIP"), ports.get("http")
    return (str(address), int(port)) if running and address and port else None
