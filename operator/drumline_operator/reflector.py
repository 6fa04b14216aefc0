"""Keeps the store like the cluster: list a kind, watch it from there, list again when the watch is too old.

A list that follows a break tells what has gone meanwhile, which events alone never would.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from msgspec import Raw

from drumline_operator.cluster import ClusterError, Expired, Forbidden, Throttled
from drumline_operator.store import Store
from drumline_operator.trimmed import Kept, keep

log = logging.getLogger(__name__)

_BASE: Final = 0.2
_LONGEST: Final = 30.0
#: A watch that lasted this long was a good one.
_GOOD: Final = 5.0


@dataclass(frozen=True)
class Page:
    """Part of a list. ``token``: of the next part, empty at the end; ``version``: of the whole list."""

    items: Sequence[Raw]
    version: str
    token: str = ""


@dataclass(frozen=True)
class Watched:
    """One event of a watch. ``type``: ADDED, MODIFIED, DELETED or BOOKMARK."""

    type: str
    object: Raw
    version: str


class Source(Protocol):
    """An API server that lists and watches. Both may raise :class:`ClusterError`; :class:`Expired`: list anew."""

    async def page(self, kind: str, namespace: str | None, selector: str, token: str) -> Page:
        """Return one part of a list."""
        ...

    def watch(self, kind: str, namespace: str | None, selector: str, version: str) -> AsyncIterator[Watched]:
        """Yield what happens after ``version``; ends from time to time, as API servers want it."""
        ...


class Reflector:
    """Watches one kind.

    Args:
        source: the API server.
        store: gets what is seen.
        kind: what is watched.
        namespace: where; None: everywhere.
        selector: the labels that are watched for; the API server filters.
        optional: the operator can do without this kind, and may have no leave to see it.
        clock: seconds.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        kind: str,
        namespace: str | None = None,
        selector: str = "",
        *,
        optional: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._source, self._store = source, store
        self.kind, self.namespace, self._selector = kind, namespace, selector
        self._optional = optional
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        #: Set when the store has had everything once, or it is known that it may not be seen.
        self.synced = asyncio.Event()
        #: Whether the API server refuses to show this kind.
        self.forbidden = False
        #: When the API server was last heard of, also when it only said that nothing has happened.
        self.heard: float | None = None
        self._failures = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        version = ""
        while True:
            began = self._clock()
            try:
                if not version:
                    version = await self._list()
                async for event in self._source.watch(self.kind, self.namespace, self._selector, version):
                    version = event.version or version
                    self._heard()
                    self._see(event)
                self.heard = self._clock()  # it had answered, if only to say nothing
                if self._clock() - began < _GOOD:
                    await self._pause(0.0)
            except Expired as error:
                log.info("%s: %s; it is listed anew", self.kind, error)
                version = ""
                await self._pause(0.0)
            except Forbidden as error:
                if not self.forbidden:
                    log.warning("%s is not watched: %s", self.kind, error)
                self.forbidden, version = True, ""
                if self._optional:
                    self.synced.set()
                await self._pause(0.0)
            except ClusterError as error:
                log.warning("%s: the watch broke: %s", self.kind, error)
                if self._clock() - began >= _GOOD:
                    self._failures = 0
                await self._pause(error.retry_after if isinstance(error, Throttled) else 0.0)

    async def list_until_done(self) -> None:
        """List once, without a watch; tried again until it works."""
        while True:
            try:
                await self._list()
            except ClusterError as error:
                log.warning("%s: cannot be listed: %s", self.kind, error)
                await self._pause(error.retry_after if isinstance(error, Throttled) else 0.0)
            else:
                return

    async def _list(self) -> str:
        found: list[Kept] = []
        token = ""
        while True:
            page = await self._source.page(self.kind, self.namespace, self._selector, token)
            found += (keep(self.kind, item) for item in page.items)
            token = page.token
            if not token:
                break
        self._store.replace(self.kind, self.namespace, found, int(page.version or 0))
        self.forbidden = False
        self._heard()
        self.synced.set()
        return page.version

    def _see(self, event: Watched) -> None:
        if event.type in {"ADDED", "MODIFIED"}:
            self._store.seen(self.kind, event.object)
        elif event.type == "DELETED":
            self._store.gone(self.kind, event.object)

    def _heard(self) -> None:
        self.heard = self._clock()
        self._failures = 0

    async def _pause(self, at_least: float) -> None:
        """Back off, a little differently each time, so that watches that broke together do not come back together."""
        delay = max(at_least, min(_LONGEST, _BASE * 2.0 ** min(self._failures, 16)))
        self._failures += 1
        await asyncio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311 - spread, not secrecy
