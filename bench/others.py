"""What other programs take of the machine while a bench runs: ratios that were measured beside much of it are not judged."""

from __future__ import annotations

import os
import time

import psutil

_NOT_BUSY = {"idle", "iowait", "guest", "guest_nice"}  # a guest's time is in that of its host, too


class Others:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """Return what others, and the host of a virtual machine, took of all usable cores' time: 0 to 1."""
        wall = time.monotonic() - self._began
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return min(1.0, max(0.0, others / (wall * len(_cores()))))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy_seconds() -> float:
    """All programs' time on our cores since the machine was started."""
    times = psutil.cpu_times(percpu=True)
    cores = [times[core] for core in _cores() if core < len(times)]
    return float(sum(getattr(each, name) for each in cores for name in each._fields if name not in _NOT_BUSY))


def _own_seconds() -> float:
    """This process's time, that of all it started, and that of those which they have waited for."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.Error:
            continue  # it has ended meanwhile
        total += used.user + used.system
        # Where the kernel does not tell of ended children, they count as others': less is judged, nothing wrongly.
        total += getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0)
    return total
