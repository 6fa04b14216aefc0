"""The step gate: all ranks leave a cancelled request at the same step, without an extra collective.

Rank 0 alone decides. At each step boundary it publishes ``sequence << 32 | step << 1 | stop`` in one 64-bit word; a
follower at step ``s`` obeys the first decision of this request that covers ``s``: stop if rank 0 stopped at a step <= s,
go on if rank 0 went on at a step >= s. A stale request to stop names an older sequence and is ignored. Ranks may be at
different steps (pipelines), no barrier is added; the pure cost is well under a microsecond.
"""

from __future__ import annotations

import time

from drumline.page import Page

LAST_STEP = (1 << 31) - 1
_STEP_MASK = (1 << 31) - 1
#: A follower that is ahead of rank 0 yields this often before it starts to doze; nearly always the decision is there.
_YIELDS = 200
_DOZE_SECONDS = 5e-5
_LONGEST_DOZE_SECONDS = 2e-3


def pack_decision(sequence: int, step: int, stop: bool) -> int:
    """Return the decision word."""
    return sequence << 32 | min(step, LAST_STEP) << 1 | int(stop)


def read_decision(word: int, sequence: int, step: int) -> bool | None:
    """Return what ``word`` says to a follower at ``step`` of ``sequence``: True stop, False go on, None nothing yet."""
    if word >> 32 != sequence:
        return None
    decided = (word >> 1) & _STEP_MASK
    if word & 1:
        return decided <= step
    return False if decided >= step else None


class Gate:
    """One rank's side of the gate. ``reach()`` is called at every step boundary of a request."""

    def __init__(self, page: Page, rank: int) -> None:
        self._page = page
        self._rank = rank
        self._sequence = 0
        self.step = 0

    def begin(self, sequence: int) -> None:
        """Start request ``sequence`` at step 0."""
        self._sequence = sequence
        self.step = 0
        self._page.begin(self._rank, sequence)
        if self._rank == 0:
            self._page.decision = pack_decision(sequence, 0, stop=False)

    def reach(self) -> bool:
        """Advance one step and return True when the request stops here, on all ranks at this step."""
        step = self.step = self.step + 1
        page = self._page
        page.reach(self._rank, step)
        if self._rank == 0:
            stop = page.wanted == self._sequence
            page.decision = pack_decision(self._sequence, step, stop)
            return stop
        return self._follow(step)

    def _follow(self, step: int) -> bool:
        # A futex would need ctypes and still a time-out; a gloo or NCCL collective of the same step spins as well.
        # The bound is the runner's: it ends the whole group when rank 0 is lost, hangs, or overruns a cancel.
        waits = 0
        while (said := read_decision(self._page.decision, self._sequence, step)) is None:
            waits += 1
            time.sleep(0 if waits < _YIELDS else min(_DOZE_SECONDS * (waits - _YIELDS + 1), _LONGEST_DOZE_SECONDS))
        return said

    def end(self, *, failed: bool) -> None:
        """Leave the request. When rank 0 failed its followers stop at the next step; otherwise they may run to their end."""
        if self._rank == 0:
            word = self._page.decision
            if not (word & 1 and word >> 32 == self._sequence):
                step = self.step + 1 if failed else LAST_STEP
                self._page.decision = pack_decision(self._sequence, step, stop=failed)
        self._page.begin(self._rank, 0)
