"""The shared page: one mapping per group with a few aligned 64-bit words, written without locks.

========  =============  =============================================================================
word      written by     meaning
========  =============  =============================================================================
0         rank 0         step decision: ``sequence << 32 | step << 1 | stop`` (see ``drumline.rank.gate``)
8         runner         sequence of the request that should stop
16+8r     rank r         heartbeat: ``time.monotonic_ns()`` of its last sign of progress
16+8r+1   rank r         step it reached in its current request
16+8r+2   rank r         sequence of its current request, 0 when idle
========  =============  =============================================================================

Every word has one writer. Words of different writers lie in different cache lines. An aligned 8-byte store is atomic on
every platform that is supported, so a reader sees the old or the new value, never a mixture.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time

_WORDS_PER_LINE = 8
_DECISION = 0
_WANTED = _WORDS_PER_LINE
_RANKS = 2 * _WORDS_PER_LINE


def create_file(name: str, size: int) -> int:
    """Return a descriptor of an anonymous file of ``size`` bytes, which vanishes with its last descriptor or mapping.

    On Linux its size is final: nobody who is given it can end those who have it mapped by making it shorter.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        descriptor, path = tempfile.mkstemp(prefix=f"drumline-{name}-")
        os.unlink(path)
    try:
        os.ftruncate(descriptor, size)
        if hasattr(fcntl, "F_ADD_SEALS"):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Page:
    """A mapped shared page for ``world_size`` ranks. The descriptor stays the caller's."""

    def __init__(self, descriptor: int, world_size: int) -> None:
        self._map = mmap.mmap(descriptor, self.size(world_size))
        self._view = memoryview(self._map)
        self.words = self._view.cast("Q")
        self.world_size = world_size

    @staticmethod
    def size(world_size: int) -> int:
        """Bytes needed for ``world_size`` ranks."""
        return 8 * (_RANKS + _WORDS_PER_LINE * world_size)

    def close(self) -> None:
        """Unmap. The page must not be used afterwards."""
        self.words.release()
        self._view.release()
        self._map.close()

    # -- runner

    def request_stop(self, sequence: int) -> None:
        """Ask the ranks to stop request ``sequence`` at their next common step boundary."""
        self.words[_WANTED] = sequence

    def last_sign(self, rank: int) -> float:
        """Monotonic seconds of the rank's last sign of progress; 0.0 when there was none."""
        return self.words[_RANKS + _WORDS_PER_LINE * rank] / 1e9

    def step(self, rank: int) -> int:
        """Last step that the rank reported in its current request."""
        return self.words[_RANKS + _WORDS_PER_LINE * rank + 1]

    def sequence(self, rank: int) -> int:
        """Sequence of the request that the rank runs, 0 when idle."""
        return self.words[_RANKS + _WORDS_PER_LINE * rank + 2]

    # -- rank

    def beat(self, rank: int) -> None:
        """Record a sign of progress now."""
        self.words[_RANKS + _WORDS_PER_LINE * rank] = time.monotonic_ns()

    def begin(self, rank: int, sequence: int) -> None:
        """Record that the rank starts (or, with 0, has ended) a request."""
        base = _RANKS + _WORDS_PER_LINE * rank
        self.words[base + 1] = 0
        self.words[base + 2] = sequence
        self.words[base] = time.monotonic_ns()

    def reach(self, rank: int, step: int) -> None:
        """Record the step that the rank reached, which is also a heartbeat."""
        base = _RANKS + _WORDS_PER_LINE * rank
        self.words[base + 1] = step
        self.words[base] = time.monotonic_ns()

    @property
    def wanted(self) -> int:
        """Sequence of the request that the runner wants stopped."""
        return self.words[_WANTED]

    @property
    def decision(self) -> int:
        """Rank 0's last step decision."""
        return self.words[_DECISION]

    @decision.setter
    def decision(self, value: int) -> None:
        self.words[_DECISION] = value
