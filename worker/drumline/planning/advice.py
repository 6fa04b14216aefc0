"""Which plan to take, and why. PURE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drumline.planning.option import LINKS, Machine, Option

#: An approximate plan is only mentioned when it is at least so much faster than the best exact one.
WORTH_IT = 1.2


@dataclass(frozen=True)
class Advice:
    """The outcome.

    Attributes:
        best: None when nothing fits.
        why: one sentence or two.
    """

    best: Option | None
    why: str


def advise(options: Sequence[Option], machine: Machine, goal: str = "latency") -> Advice:
    """Choose among ``options``.

    Args:
        options: of one model.
        machine: theirs.
        goal: ``latency`` (the shortest step) or ``throughput`` (the most results per second).
    """
    fitting = [option for option in options if option.fits(machine)]
    if not fitting:
        least = min(options, key=lambda option: option.memory, default=None)
        if least is None:
            return Advice(None, "no plan is possible for this number of GPUs; the reasons are below")
        return Advice(
            None,
            f"nothing fits: the smallest plan, {least.plan}, needs {gib(least.memory)} of each GPU and "
            f"{gib(machine.usable)} are usable; use more or larger GPUs, or a smaller batch",
        )

    def worth(option: Option) -> tuple[float, float, float]:
        main = option.rate(machine) if goal == "throughput" else -option.seconds(machine)
        return main, -option.wire, -option.memory

    exact = [option for option in fitting if option.exact]
    best = max(exact or fitting, key=worth)
    seconds = best.seconds(machine)
    share = best.wire / LINKS[machine.link] / seconds if seconds else 0.0
    what = "most results per second" if goal == "throughput" else "shortest step"
    why = f"of {len(fitting)} plans that fit it has the {what}: {gib(best.memory)} of {gib(machine.usable)} usable, "
    why += f"{share:.0%} of the time on the wire ({machine.link})" if best.wire else "nothing on the wire"
    other = max(fitting, key=worth)
    gain = other.rate(machine) / best.rate(machine) if goal == "throughput" else seconds / other.seconds(machine)
    if not other.exact and best.exact and gain >= WORTH_IT:
        why += f"; {other.plan} is {gain:.1f} times as fast if an approximation will do"
    return Advice(best, why)


def gib(size: float) -> str:
    """Return bytes for people: ``12.3 GiB``."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            number = size / factor
            return f"{number:.1f} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{size:.0f} B"
