"""What the group's state machine says should be done, and what ranks say they did: data only. PURE."""

from __future__ import annotations

from typing import Literal

import msgspec

from drumline.errors import DrumlineError, RankLost

Timer = Literal["grace", "verdict", "backoff"]


class Launch(msgspec.Struct, frozen=True, gc=False):
    """Start the processes of a new incarnation."""

    incarnation: int


class Kill(msgspec.Struct, frozen=True, gc=False):
    """End all processes of the current incarnation now; report when they are gone."""


class Send(msgspec.Struct, frozen=True, gc=False):
    """Give request ``number`` to every rank under ``sequence``."""

    number: int
    sequence: int


class StopRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask the ranks to leave request ``sequence`` at their next common step."""

    sequence: int


class Resolve(msgspec.Struct, frozen=True, gc=False):
    """Request ``number`` is over: with rank 0's value when ``error`` is None."""

    number: int
    error: DrumlineError | None = None


class SendTeardown(msgspec.Struct, frozen=True, gc=False):
    """Tell every rank to tear down and exit."""


class Arm(msgspec.Struct, frozen=True, gc=False):
    """Start (or restart) a timer."""

    timer: Timer
    seconds: float


class Disarm(msgspec.Struct, frozen=True, gc=False):
    """Stop a timer."""

    timer: Timer


class Started(msgspec.Struct, frozen=True, gc=False):
    """The first start is over: ready when ``error`` is None."""

    error: DrumlineError | None = None


class Restarting(msgspec.Struct, frozen=True, gc=False):
    """The group is being restarted because of ``reason``."""

    reason: str


class GaveUp(msgspec.Struct, frozen=True, gc=False):
    """The restart budget is used up."""

    error: DrumlineError


class Ended(msgspec.Struct, frozen=True, gc=False):
    """Stopping is over."""


Effect = (
    Launch | Kill | Send | StopRequest | Resolve | SendTeardown | Arm | Disarm | Started | Restarting | GaveUp | Ended
)


class Answer(msgspec.Struct, frozen=True, gc=False):
    """How one rank left a request.

    ``error``: what it raised. ``peer``: that error only says that another rank is gone. ``step``: where it stopped when it
    was told to. ``collectives``: collective operations it began during the request.
    """

    collectives: int = 0
    error: DrumlineError | None = None
    peer: bool = False
    step: int | None = None


def reason_of(error: DrumlineError) -> str:
    """A CamelCase word for a restart's reason, also a metric label."""
    return error.reason if isinstance(error, RankLost) else type(error).__name__
