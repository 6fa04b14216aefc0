"""A queue of keys: each at most once in it, each by one worker at a time, failed ones with back-off.

``Schedule`` decides (no clock, no task of its own); ``WorkQueue`` runs workers over it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import Final

log = logging.getLogger(__name__)

_BASE: Final = 0.25
_LONGEST: Final = 60.0


class Schedule:
    """When which key is due. Times are seconds of any clock that only goes forward."""

    def __init__(self, *, base: float = _BASE, longest: float = _LONGEST) -> None:
        self._base, self._longest = base, longest
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = 0
        self._running: set[str] = set()
        self._again: dict[str, float] = {}
        #: How often in a row a key has failed, and until when it was to wait.
        self._failures: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        """Keys that wait, due or not."""
        return len(self._due)

    def ready(self, now: float) -> int:
        """Return how many keys are due."""
        return sum(due <= now for due in self._due.values())

    def add(self, key: str, at: float) -> None:
        """Want ``key`` at time ``at``; the earliest wish counts. While it runs, it is wanted once more afterwards."""
        if key in self._running:
            self._again[key] = min(at, self._again.get(key, at))
        elif at < self._due.get(key, float("inf")):
            self._due[key] = at
            self._count += 1
            heapq.heappush(self._heap, (at, self._count, key))

    def next_due(self) -> float | None:
        """Return when the next key is due, or None when none waits."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # an earlier wish has replaced it
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> str | None:
        """Return a key that is due, which then runs until :meth:`done` or :meth:`failed`; None when there is none."""
        due = self.next_due()
        if due is None or due > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._running.add(key)
        return key

    def done(self, key: str) -> None:
        """``key`` has run and is well: its back-off starts anew."""
        self._failures.pop(key, None)
        self._release(key)

    def failed(self, key: str, now: float, at_least: float = 0.0) -> float:
        """``key`` has run and failed; return after how many seconds it runs again.

        A wish that came while it ran does not shorten the wait, or a key that fails and is told of its own change would
        never stop.
        """
        failures, until = self._failures.get(key, (0, now))
        # One that was woken before its time has not waited in vain: a burst of news during trouble that lasts a moment
        # would otherwise make it wait for a minute.
        failures += now >= until
        delay = max(at_least, min(self._longest, self._base * 2.0 ** min(max(0, failures - 1), 32)))
        self._failures[key] = failures, now + delay
        self._running.discard(key)
        self._again.pop(key, None)
        self.add(key, now + delay)
        return delay

    def _release(self, key: str) -> None:
        self._running.discard(key)
        if key in self._again:
            self.add(key, self._again.pop(key))


class WorkQueue:
    """Workers over a :class:`Schedule`.

    Args:
        handle: runs one key; returns the seconds after which it is wanted again (0: behind what is due), or None. A negative
            number means that the key is gone and needs no resync.
        retry_after: the seconds that an error asks for at least.
        workers: how many keys run at a time.
        resync: seconds after which a key runs again though nothing was heard of it.
        clock: seconds; default: the event loop's.
    """

    def __init__(
        self,
        handle: Callable[[str], Awaitable[float | None]],
        *,
        retry_after: Callable[[Exception], float] = lambda error: 0.0,
        workers: int = 4,
        resync: float = 300.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._handle, self._retry_after, self._workers, self._resync = handle, retry_after, workers, resync
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._wake = asyncio.Event()
        self._running = 0
        self._idle = asyncio.Event()
        self.schedule = Schedule()

    def add(self, key: str, after: float = 0.0) -> None:
        """Want ``key`` in ``after`` seconds."""
        self.schedule.add(key, self._clock() + after)
        self._wake.set()

    def others_wait(self) -> bool:
        """Whether keys are due that no worker has begun with."""
        due = self.schedule.next_due()
        return due is not None and due <= self._clock()

    async def idle(self) -> None:
        """Return when no key is due, and none runs."""
        await self._idle.wait()

    async def run(self) -> None:
        """Work until cancelled; then what runs is cancelled, too."""
        async with asyncio.TaskGroup() as group:
            free = asyncio.Semaphore(self._workers)
            while True:
                await free.acquire()
                key = await self._next()
                group.create_task(self._one(key, free), name=f"reconcile {key}")

    async def _next(self) -> str:
        while (key := self.schedule.take(self._clock())) is None:
            self._wake.clear()
            if not self._running:
                self._idle.set()
            due = self.schedule.next_due()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                    await self._wake.wait()
            except TimeoutError:
                continue
        self._idle.clear()
        self._running += 1
        return key

    async def _one(self, key: str, free: asyncio.Semaphore) -> None:
        try:
            again = await self._handle(key)
        except asyncio.CancelledError:
            self.schedule.done(key)
            self.schedule.add(key, self._clock())  # nobody knows how far it came; run() may be called again
            raise
        except Exception as error:
            delay = self.schedule.failed(key, self._clock(), self._retry_after(error))
            log.warning("%s: %s: %s; again in %.2f s", key, type(error).__name__, error, delay)
        else:
            self.schedule.done(key)
            if again is None or again >= 0:
                # Spread over time, so that a thousand apps do not come at once.
                spread = 1.0 + (zlib.crc32(key.encode()) % 1000) / 5000
                self.schedule.add(
                    key, self._clock() + min(self._resync * spread, self._resync * 2 if again is None else again)
                )
        finally:
            self._running -= 1
            free.release()
            self._wake.set()
