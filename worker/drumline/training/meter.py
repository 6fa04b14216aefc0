"""How a training run goes: learning rate, samples per second, time left, and the progress update that tells it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from drumline.worker import DistributedWorker


def warmup_cosine(step: int, *, total: int, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Return the learning rate of ``step``: up in a line to ``peak``, then down a half cosine to ``floor``.

    It depends on nothing but its arguments, so a resumed run needs no scheduler state.

    Args:
        step: 0 .. total - 1.
        total: steps of the whole run.
        peak: the highest rate.
        warmup: steps of the line.
        floor: the rate after the last step.
    """
    if step < warmup:
        return peak * ((step + 1) / warmup)  # in this order it never rounds to above the peak
    if total <= warmup or step == warmup:
        return peak
    share = min(1.0, (step - warmup) / (total - warmup))
    return min(peak, floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2)


def set_learning_rate(optimizers: Iterable[Any], rate: float) -> None:
    """Set the learning rate of every parameter group of torch optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class Pace:
    """Steps per second over the latest steps, so that the time left follows a machine that becomes slower.

    Args:
        window: how many of the latest steps count.
    """

    def __init__(self, window: int = 20) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def mark(self, step: int, now: float) -> None:
        """Note that ``step`` steps are done at ``now`` (seconds of any clock)."""
        self._marks.append((step, now))

    @property
    def steps_per_second(self) -> float | None:
        """None before two marks at different times."""
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - began) if ended > began else None

    def seconds_left(self, total: int) -> float | None:
        """Return the seconds until ``total`` steps are done at this pace; None when it is not known."""
        rate = self.steps_per_second
        if not rate:
            return None
        return max(0, total - self._marks[-1][0]) / rate


class Meter:
    """Sends one progress update per step: ``{"progress": {"done", "total", "loss", "lr", ...}}``.

    Args:
        worker: whose request it is.
        total: steps of the whole run.
        samples_per_step: over all ranks.
        start: steps that are done already (a resumed run).
        clock: seconds; for tests.
    """

    def __init__(
        self,
        worker: DistributedWorker,
        total: int,
        samples_per_step: int,
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._total = total
        self._samples = samples_per_step
        self._clock = clock
        self._pace = Pace()
        self._pace.mark(start, clock())

    def report(self, done: int, *, loss: float, lr: float, **more: Any) -> None:
        """Tell that ``done`` steps are done. Call it on every rank: it is a heartbeat, too.

        Args:
            done: steps, those before a resume included.
            loss: of the step, the same on all ranks (see ``mean_over_ranks``).
            lr: learning rate of the step.
            **more: anything else the reader should see.

        The update also has ``samples_per_second`` and ``eta_seconds``, over the latest steps; both None at first.
        """
        self._pace.mark(done, self._clock())
        rate, left = self._pace.steps_per_second, self._pace.seconds_left(self._total)
        self._worker.progress(
            done,
            self._total,
            loss=loss,
            lr=lr,
            samples_per_second=None if rate is None else round(rate * self._samples, 3),
            eta_seconds=None if left is None else round(left, 1),
            **more,
        )
