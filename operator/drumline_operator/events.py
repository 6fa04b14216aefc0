"""Events behind everything else: they are for people, and come when the queue has nothing to do, or after a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from drumline_operator.cluster import ClusterError, Raw

log = logging.getLogger(__name__)

#: Seconds that an event waits at most while there is other work.
_LONGEST: Final = 60.0
#: Events that wait; of more, the oldest are lost.
_MOST: Final = 5000
#: Seconds for what is left when the operator ends.
_LAST: Final = 2.0
#: What an event says of the object it is about.
_SUBJECT: Final = ("name", "namespace", "uid", "resourceVersion")


@dataclass(frozen=True)
class News:
    """An event that waits. ``about``: an object with what its event says of it; ``since``: the loop's time."""

    about: Raw
    type: str
    reason: str
    message: str
    at: datetime
    since: float


Post = Callable[[Raw, str, str, str, datetime], Awaitable[None]]


class Events:
    """Posts events one after the other; those of one reason about one object become one while they wait.

    Args:
        post: posts one: the object, its type, reason, message, and when it happened.
        idle: returns when the queue has nothing to do.
        longest: seconds that one waits at most.
        most: how many wait at most.
    """

    def __init__(
        self, post: Post, idle: Callable[[], Awaitable[None]], *, longest: float = _LONGEST, most: int = _MOST
    ) -> None:
        self._post, self._idle, self._longest, self._most = post, idle, longest, most
        self._waiting: dict[tuple[str, str, str], News] = {}
        self._some = asyncio.Event()

    def add(self, raw: Raw, type: str, reason: str, message: str) -> None:
        """Have an event about ``raw`` posted."""
        meta = raw["metadata"]
        key = str(meta.get("uid")), type, reason
        before = self._waiting.get(key)
        if before is not None:
            if message not in before.message:
                self._waiting[key] = replace(before, message=f"{before.message}; {message}")
            return
        if len(self._waiting) >= self._most:
            lost = self._waiting.pop(next(iter(self._waiting)))
            log.warning("too many events wait: %s about %s is lost", lost.reason, lost.about["metadata"]["name"])
        about = {
            **{name: raw[name] for name in ("apiVersion", "kind")},
            "metadata": {name: meta[name] for name in _SUBJECT if name in meta},
        }
        self._waiting[key] = News(about, type, reason, message, datetime.now(UTC), _now())
        self._some.set()

    async def run(self) -> None:
        """Post until cancelled; then what waits is posted, if that does not take long."""
        try:
            while True:
                if not self._waiting:
                    self._some.clear()
                    await self._some.wait()
                oldest = next(iter(self._waiting.values()))
                try:
                    async with asyncio.timeout_at(oldest.since + self._longest):
                        await self._idle()
                except TimeoutError:
                    pass
                await self._next()
        finally:
            try:
                async with asyncio.timeout(_LAST):
                    while self._waiting:
                        await self._next()
            except TimeoutError:
                log.warning("the operator ends: %d events are lost", len(self._waiting))

    async def _next(self) -> None:
        key = next(iter(self._waiting))
        news = self._waiting.pop(key)
        try:
            await self._post(news.about, news.type, news.reason, news.message, news.at)
        except ClusterError as error:
            log.warning("%s: event %s is lost: %s", news.about["metadata"]["name"], news.reason, error)


def _now() -> float:
    return asyncio.get_running_loop().time()
