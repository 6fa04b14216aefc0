"""The group's state machine: what has happened goes in, what to do comes out. PURE: no clock, no I/O.

    new ──start──▶ starting ──all ranks ready──▶ ready ◀────────────┐
                      │ a rank fails              │ a rank is lost,  │ all ranks ready
                      ▼                           ▼ hung or stuck    │
                    failed ◀──budget used up── restarting ───────────┘
    any ──stop──▶ stopping ──all processes gone──▶ stopped

One failure decides for the group: the first dead, hung or failed rank is reported, once; what its peers say about it
afterwards ("connection reset") is not. A group never runs two requests at a time, and the next one is sent only when all
ranks have answered the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from drumline.contract import RestartSettings
from drumline.errors import DrumlineError, NotReady, QueueTimeout, RankLost, RequestCancelled, RequestTimeout
from drumline.runner.admission import FairQueue
from drumline.runner.effects import (
    Answer,
    Arm,
    Disarm,
    Effect,
    Ended,
    GaveUp,
    Kill,
    Launch,
    Resolve,
    Restarting,
    Send,
    SendTeardown,
    Started,
    StopRequest,
    Timer,
    reason_of,
)

#: How long a rank's "my peer is gone" waits for the peer's own story; that of a rank without an exit status takes 1 s.
VERDICT_SECONDS = 1.5


class State(StrEnum):
    """States of a group, as shown in ``/status``."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Flight(msgspec.Struct, eq=False):
    """The request that runs."""

    number: int
    sequence: int
    answers: dict[int, Answer] = {}
    reason: DrumlineError | None = None  # why it was told to stop
    resolved: bool = False
    stopping: bool = False
    in_doubt: bool = False  # a rank only said that a peer is gone; the peer's own story is awaited


class Group:
    """State machine of one group. Every method returns the effects to perform, in order."""

    def __init__(self, world_size: int, *, max_queue_depth: int, cancel_grace: float, restart: RestartSettings) -> None:
        self.world_size = world_size
        self.cancel_grace = cancel_grace
        self.restart = restart
        self.state = State.NEW
        self.queue = FairQueue(max_queue_depth)
        self.flight: Flight | None = None
        self.incarnation = 0
        self.restarts = 0
        self.ready_ranks: set[int] = set()
        self.last_failure: DrumlineError | None = None
        self.teardown_failure: DrumlineError | None = None
        self._sequence = 0
        self._restart_times: deque[float] = deque()
        self._failures_in_a_row = 0
        self._starting_first = False
        self._dying = False  # the current incarnation was told to die
        self._torn_down: set[int] = set()
        self._tearing_down = False
        self._peer_failures: dict[int, DrumlineError] = {}  # setups that only say that another rank is gone

    # -- life

    def start(self) -> list[Effect]:
        """Begin the first start (or one after ``stopped``/``failed``)."""
        self.state = State.STARTING
        self._starting_first = True
        self.last_failure = self.teardown_failure = None
        self._failures_in_a_row = 0
        self._restart_times.clear()
        return self._launch()

    def _launch(self) -> list[Effect]:
        self.incarnation += 1
        self._sequence = 0
        self.ready_ranks.clear()
        self._torn_down.clear()
        self._peer_failures.clear()
        self._dying = self._tearing_down = False
        return [Launch(self.incarnation)]

    def rank_ready(self, rank: int) -> list[Effect]:
        """``setup()`` of ``rank`` returned."""
        if self._dying or self.state not in (State.STARTING, State.RESTARTING):
            return []
        self.ready_ranks.add(rank)
        if len(self.ready_ranks) < self.world_size:
            return []
        effects: list[Effect] = [Started()] if self._starting_first else []
        self._starting_first = False
        self.state = State.READY
        return effects + self._dispatch()

    def setup_failed(self, rank: int, error: DrumlineError, *, peer: bool, now: float) -> list[Effect]:
        """``setup()`` of ``rank`` raised; ``peer``: because another rank is gone, whose own story is awaited shortly."""
        if not peer:
            return self.lost(error, now)
        self._peer_failures[rank] = error
        return [Arm("verdict", VERDICT_SECONDS)]

    def lost(self, error: DrumlineError, now: float) -> list[Effect]:
        """A rank died, hung, failed its setup, or the group cannot be trusted any more. ``now``: monotonic seconds."""
        if self._dying or self.state in (State.NEW, State.STOPPED, State.FAILED):
            return []
        if self.state == State.STOPPING:
            return self._lost_while_stopping(error)
        self.last_failure = error
        self._dying = True
        self.ready_ranks.clear()
        effects = self._abandon(error)
        if self._starting_first:
            self.state = State.FAILED
            return [*effects, Kill()]
        while self._restart_times and now - self._restart_times[0] > self.restart.window_seconds:
            self._restart_times.popleft()
        if len(self._restart_times) >= self.restart.max_restarts:
            self.state = State.FAILED
            return [*effects, Kill(), GaveUp(error), *self._refuse_all(error)]
        self._restart_times.append(now)
        self.restarts += 1
        self._failures_in_a_row += 1
        self.state = State.RESTARTING
        return [*effects, Kill(), Restarting(reason_of(error))]

    def renew(self) -> list[Effect]:
        """Replace the ranks by new ones, which costs no restart: their code has changed."""
        if self.state not in (State.READY, State.RESTARTING, State.STARTING) or self._dying:
            return []
        effects = self._abandon(RequestCancelled("the ranks are being reloaded"))
        self._dying = True
        self.ready_ranks.clear()
        self.state = State.RESTARTING
        self._failures_in_a_row = 0
        return [*effects, Kill()]

    def _abandon(self, error: DrumlineError) -> list[Effect]:
        flight, self.flight = self.flight, None
        effects: list[Effect] = [Disarm("grace"), Disarm("verdict")]
        if flight is not None and not flight.resolved:
            effects.append(Resolve(flight.number, error))
        return effects

    def _refuse_all(self, error: DrumlineError) -> list[Effect]:
        effects: list[Effect] = []
        while (number := self.queue.take()) is not None:
            effects.append(Resolve(number, error))
        return effects

    def gone(self) -> list[Effect]:
        """Every process of the current incarnation has ended."""
        if self.state == State.STOPPING:
            self.state = State.STOPPED
            return [Ended()]
        if self.state == State.FAILED:
            if not self._starting_first:
                return []
            self._starting_first = False
            return [Started(self.last_failure), *self._refuse_all(self.last_failure or NotReady("the start failed"))]
        if self.state != State.RESTARTING or not self._dying:
            return []
        if self._failures_in_a_row <= 1:
            return self._launch()
        delay = self.restart.backoff_seconds * 2.0 ** min(self._failures_in_a_row - 2, 16)
        if delay <= 0:
            return self._launch()
        return [Arm("backoff", min(delay, self.restart.max_backoff_seconds))]

    def stop(self) -> list[Effect]:
        """Stop for good: waiting requests are refused, the running one is asked to stop, then ranks tear down."""
        if self.state in (State.NEW, State.STOPPED):
            self.state = State.STOPPED
            return [Ended()]
        if self.state == State.STOPPING:
            return []
        was, self.state = self.state, State.STOPPING
        effects: list[Effect] = [Disarm("backoff")]
        refusal = NotReady("the runner is stopping", state=str(State.STOPPING))
        effects += self._refuse_all(refusal)
        if self._starting_first:
            self._starting_first = False
            effects.append(Started(NotReady("the runner was stopped while it started", state=str(State.STOPPING))))
        if was == State.READY and not self._dying:
            if self.flight is None:
                return effects + self._teardown()
            return effects + self._stop_flight(RequestCancelled("the runner is stopping"))
        if self._dying:
            return [*effects, Kill()]
        self._dying = True
        return [*effects, Kill()]

    def _teardown(self) -> list[Effect]:
        self._tearing_down = True
        return [SendTeardown()]

    def torn_down(self, rank: int, failure: DrumlineError | None) -> list[Effect]:
        """``teardown()`` of ``rank`` ended."""
        self._torn_down.add(rank)
        self.teardown_failure = self.teardown_failure or failure
        return []

    def exited(self, rank: int, error: RankLost, now: float) -> list[Effect]:
        """The process of ``rank`` ended; ``error`` is what to say when that was not expected."""
        if rank in self._peer_failures or (self._tearing_down and rank in self._torn_down):
            return []
        return self.lost(error, now)

    def _lost_while_stopping(self, error: DrumlineError) -> list[Effect]:
        effects = self._abandon(error)
        if self._tearing_down:
            self.teardown_failure = self.teardown_failure or error
        self.last_failure = error
        self._dying = True
        return [*effects, Kill()]

    def kill(self) -> list[Effect]:
        """Stopping took too long."""
        self._dying = True
        missing = sorted(set(range(self.world_size)) - self._torn_down)
        if self._tearing_down and missing:
            text = f"teardown() did not end in time on rank {', '.join(map(str, missing))}"
            self.last_failure = RankLost(missing[0], reason="Stuck", message=text)
            self.teardown_failure = self.teardown_failure or self.last_failure
        effects = self._abandon(RequestCancelled("the runner was stopped"))
        return [*effects, Kill()]

    # -- requests

    def submit(self, number: int, caller: str) -> list[Effect]:
        """Queue request ``number``. The shell has checked :attr:`accepts` and ``queue.full``."""
        self.queue.put(number, caller)
        return self._dispatch()

    @property
    def accepts(self) -> bool:
        """True when requests may be submitted (they may have to wait for a restart)."""
        return self.state in (State.STARTING, State.READY, State.RESTARTING)

    @property
    def idle(self) -> bool:
        """True when a submitted request would be sent at once."""
        return self.state == State.READY and self.flight is None and not self._dying

    def _dispatch(self) -> list[Effect]:
        if not self.idle or (number := self.queue.take()) is None:
            return []
        self._sequence += 1
        self.flight = Flight(number, self._sequence)
        return [Send(number, self._sequence)]

    def answered(self, rank: int, sequence: int, answer: Answer, now: float) -> list[Effect]:
        """Rank ``rank`` left request ``sequence``."""
        flight = self.flight
        if flight is None or flight.sequence != sequence or self._dying:
            return []
        flight.answers[rank] = answer
        complete = len(flight.answers) == self.world_size
        effects: list[Effect] = []
        if answer.error is not None and not flight.resolved:
            if answer.peer and not complete:
                flight.in_doubt = True
                effects.append(Arm("verdict", VERDICT_SECONDS))
            elif not answer.peer:
                effects += self._resolve(answer.error)
        if not complete:
            if answer.error is not None and not flight.stopping:
                effects += self._stop_flight(answer.error)
            return effects
        return effects + self._finish(flight, now)

    def _resolve(self, error: DrumlineError | None) -> list[Effect]:
        flight = self.flight
        assert flight is not None
        if flight.resolved:
            return []
        flight.resolved = True
        resolve: list[Effect] = [Resolve(flight.number, error)]
        return [Disarm("verdict"), *resolve] if flight.in_doubt else resolve

    def _stop_flight(self, reason: DrumlineError) -> list[Effect]:
        flight = self.flight
        assert flight is not None
        if flight.reason is None:
            flight.reason = reason
        if flight.stopping:
            return []
        flight.stopping = True
        return [StopRequest(flight.sequence), Arm("grace", self.cancel_grace)]

    def _finish(self, flight: Flight, now: float) -> list[Effect]:
        effects: list[Effect] = [Disarm("grace")] if flight.stopping else []
        failures = [a.error for a in flight.answers.values() if a.error is not None]
        steps = [a.step for a in flight.answers.values() if a.step is not None]
        if not flight.resolved:
            if failures:
                effects += self._resolve(failures[0])
            elif steps:
                reason = flight.reason or RequestCancelled()
                if isinstance(reason, RequestCancelled):
                    reason = RequestCancelled(str(reason), step=max(steps))
                effects += self._resolve(reason)
            else:
                effects += self._resolve(None)
        if failures and self._desynchronised(flight):
            return effects + self.lost(self._desynchronisation(flight), now)
        self.flight = None
        self._failures_in_a_row = 0
        if self.state == State.STOPPING:
            return effects + self._teardown()
        return effects + self._dispatch()

    @staticmethod
    def _desynchronised(flight: Flight) -> bool:
        """Whether some rank began a collective that another did not: the next one would pair wrongly."""
        return len({a.collectives for a in flight.answers.values()}) > 1

    @staticmethod
    def _desynchronisation(flight: Flight) -> DrumlineError:
        counts = ", ".join(f"rank {r}: {a.collectives}" for r, a in sorted(flight.answers.items()))
        first = min(flight.answers, key=lambda r: flight.answers[r].collectives)
        return RankLost(
            first,
            reason="Desynchronised",
            message=f"the ranks left a failed request after different numbers of collectives ({counts})",
        )

    def cancel(self, number: int, reason: DrumlineError) -> list[Effect]:
        """Cancel a waiting or running request; ``reason`` becomes its error."""
        if self.queue.remove(number):
            return [Resolve(number, reason)]
        if self.flight is not None and self.flight.number == number and not self.flight.resolved:
            return self._stop_flight(reason)
        return []

    def expired(self, number: int, *, waiting_only: bool = False) -> list[Effect]:
        """A deadline of request ``number`` passed."""
        if self.queue.remove(number):
            return [Resolve(number, QueueTimeout("the request waited too long for its turn"))]
        if waiting_only or self.flight is None or self.flight.number != number or self.flight.resolved:
            return []
        error = RequestTimeout("the request ran longer than its time-out")
        return self._resolve(error) + self._stop_flight(error)

    # -- timers

    def fired(self, timer: Timer, now: float, laggards: Sequence[int] = ()) -> list[Effect]:
        """A timer that was armed has run out. ``laggards``: all ranks, the one that holds the others up first."""
        flight = self.flight
        if timer == "backoff":
            return self._launch() if self.state == State.RESTARTING and self._dying else []
        if timer == "verdict" and self._peer_failures:
            return self.lost(next(iter(self._peer_failures.values())), now)
        if flight is None:
            return []
        if timer == "verdict":
            errors = [a.error for a in flight.answers.values() if a.error is not None]
            return self._resolve(errors[0]) if errors else []
        missing = [rank for rank in laggards or range(self.world_size) if rank not in flight.answers]
        ranks = ", ".join(map(str, sorted(missing)))
        cause = flight.reason or RequestCancelled()
        effects = [] if flight.resolved else self._resolve(cause)
        stuck = RankLost(
            missing[0] if missing else 0,
            reason="Stuck",
            message=f"rank {ranks} did not leave the request within {self.cancel_grace:g} s after: {cause}",
        )
        return effects + self.lost(stuck, now)
