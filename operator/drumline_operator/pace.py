"""How often the statuses of apps that start tell of each step. PURE: told the time.

What an app comes to (it serves, it fails and why) is always written at once. On the way there a status changes with every
step of every pod; of a thousand apps at a time that would be thousands of writes that the API server needs its time for
elsewhere, and that nobody can read.
"""

from __future__ import annotations

from typing import Final

_RATE: Final = 5.0
_BURST: Final = 20


class Pace:
    """Gives each key a time at which it may tell of progress.

    Args:
        rate: how many keys a second.
        burst: how many at once after a quiet time.
    """

    def __init__(self, rate: float = _RATE, burst: int = _BURST) -> None:
        self._step, self._ahead = 1.0 / rate, burst / rate
        self._next = float("-inf")
        self._given: dict[str, float] = {}

    def turn(self, key: str, now: float) -> float:
        """Return the seconds until ``key`` may tell, and keep that time for it; 0: now."""
        at = self._given.get(key)
        if at is None:
            self._next = max(self._next, now - self._ahead) + self._step
            at = self._given[key] = self._next
        return max(0.0, at - now)

    def wait(self, key: str, now: float) -> float:
        """Return the seconds until ``key`` may tell; 0: now, and that uses its time up."""
        wait = self.turn(key, now)
        if wait == 0.0:
            del self._given[key]
        return wait

    def left(self, key: str, now: float) -> float:
        """Return the seconds until the time that ``key`` was given, or 0 when it was given none."""
        return max(0.0, self._given.get(key, now) - now)

    def forget(self, key: str) -> None:
        """``key`` has told all, or is gone."""
        self._given.pop(key, None)
