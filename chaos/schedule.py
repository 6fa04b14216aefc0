"""Which fault comes when. PURE: the same seed gives the same list, whatever happens while it is worked off."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

#: How often each kind comes, relative to the others. What takes seconds (a hang must be noticed, torch imported anew) is rare.
STEADY: Final = {
    "kill-rank": 22, "crash-rank": 8, "kill-all-ranks": 6, "pause-rank": 8, "freeze-rank": 2, "pause-server": 6,
    "kill-rank-of-paused-server": 5, "pause-nursery": 5, "kill-nursery": 2, "drop-clients": 6, "cancel-all": 6, "burst": 4,
    "fill-disk": 3, "fill-disk-and-kill-rank": 3, "fill-shm": 3, "fill-shm-and-kill-rank": 3, "roll-clock": 6,
    "roll-clock-and-kill-rank": 3,
}  # fmt: skip
#: These end the server, or keep it away for long.
FATAL: Final = {"kill-server": 4, "drain-server": 4, "fill-disk-and-kill-server": 1, "freeze-nursery": 1}
#: The server lives through this many faults, so that what it leaks adds up, and through none for long in the rest.
ROUND: Final = 250
_STEADY_PART: Final = 225


@dataclass(frozen=True)
class Fault:
    """One fault to come.

    Attributes:
        number: from 0.
        kind: a key of :data:`STEADY` or :data:`FATAL`.
        rank: whom it hits, where it hits one.
        amount: how much or how long, from 0 to 1.
        then: requests that begin before the next fault.
    """

    number: int
    kind: str
    rank: int
    amount: float
    then: int


def schedule(seed: int, count: int, ranks: int, without: Collection[str] = ()) -> list[Fault]:
    """Return ``count`` faults.

    Args:
        seed: of all choices; a longer schedule of the same seed begins with the shorter one.
        count: how many.
        ranks: world size.
        without: kinds that cannot be done here; the others come in their place.
    """
    faults = []
    for number in range(count):
        dice = random.Random(f"{seed}-fault-{number}")
        fatal = number % ROUND >= _STEADY_PART
        weights = STEADY | {kind: weight * 4 for kind, weight in FATAL.items()} if fatal else STEADY
        weights = {kind: weight for kind, weight in weights.items() if kind not in without}
        kind = dice.choices(list(weights), list(weights.values()))[0]
        faults.append(Fault(number, kind, dice.randrange(ranks), dice.random(), dice.choice([0, 1, 2, 5])))
    return faults


def quick(seed: int, ranks: int, without: Collection[str] = ()) -> list[Fault]:
    """Return every kind once, in an order of the seed's, for a run of a minute; what takes longest is left out."""
    dice = random.Random(f"{seed}-quick")
    kinds = [kind for kind in [*STEADY, *FATAL] if kind not in {*without, "freeze-nursery"}]
    dice.shuffle(kinds)
    return [
        Fault(n, kind, dice.randrange(ranks), dice.random(), dice.choice([0, 1, 3])) for n, kind in enumerate(kinds)
    ]
