"""The group's state machine against a simulated shell: hypothesis decides what happens to ranks, callers and timers.

Whatever happens: one request at a time, every accepted request ends exactly once, a new incarnation begins only when the
old one is gone, and a stop comes to its end.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from drumline.contract import RestartSettings
from drumline.errors import DrumlineError, RankLost, RequestCancelled, SetupFailed, WorkerError
from drumline.runner import effects as do
from drumline.runner.state import Group, State

RANKS = 3
ranks = st.integers(0, RANKS - 1)


class Life(RuleBasedStateMachine):
    @initialize(max_restarts=st.integers(0, 3), backoff=st.sampled_from([0.0, 1.0]), stubborn=st.booleans())
    def begin(self, max_restarts: int, backoff: float, stubborn: bool) -> None:
        self.group = Group(
            RANKS,
            max_queue_depth=4,
            cancel_grace=1.0,
            restart=RestartSettings(max_restarts=max_restarts, backoff_seconds=backoff),
        )
        self.now = 0.0
        self.stubborn = stubborn  # at the end, ranks leave a request only by being killed
        self.accepted: set[int] = set()
        self.ended: dict[int, DrumlineError | None] = {}
        self.sent: list[int] = []
        self.alive: set[int] = set()  # ranks of this incarnation that have a process
        self.owing: set[int] = set()  # ranks that owe an answer to the request that runs
        self.present = False  # the incarnation's end has not been reported yet
        self.answers: dict[int, do.Answer] = {}
        self.asked_to_stop = 0
        self.dying = False
        self.tearing_down = False
        self.timers: dict[str, float] = {}
        self.stopped = 0
        self.restarted = 0
        self.gave_up = 0
        self.perform(self.group.start())

    def perform(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.Launch():
                    assert not self.present, "a new incarnation while the old one lives"
                    self.present = True
                    self.alive = set(range(RANKS))
                    self.owing = set()
                    self.answers = {}
                    self.dying = self.tearing_down = False
                case do.Kill():
                    self.dying = self.present = True  # the end is reported also when there was nothing left to kill
                case do.Send():
                    assert not self.owing, "two requests at a time"
                    assert not self.dying
                    assert not self.out_of_step, "ranks that left a failed request out of step got another one"
                    assert effect.number in self.accepted
                    assert effect.number not in self.sent, "a request was run twice"
                    self.sent.append(effect.number)
                    self.sequence = effect.sequence
                    self.owing = set(range(RANKS))
                    self.answers = {}
                case do.StopRequest():
                    self.asked_to_stop = effect.sequence
                case do.Resolve():
                    assert effect.number in self.accepted
                    assert effect.number not in self.ended, "a request ended twice"
                    if effect.error is None:
                        assert not self.owing, "a result before every rank has answered"
                    self.ended[effect.number] = effect.error
                case do.SendTeardown():
                    assert not self.owing
                    self.tearing_down = True
                case do.Arm():
                    self.timers[effect.timer] = self.now + effect.seconds
                case do.Disarm():
                    self.timers.pop(effect.timer, None)
                case do.Ended():
                    self.stopped += 1
                case do.Restarting():
                    self.restarted += 1
                case do.GaveUp():
                    self.gave_up += 1

    @property
    def out_of_step(self) -> bool:
        """A rank raised, and one began a collective that another did not."""
        answers = self.answers.values()
        return any(a.error for a in answers) and len({a.collectives for a in answers}) > 1

    @property
    def starts(self) -> bool:
        """Ranks are in ``setup()``."""
        return self.present and not self.dying and self.group.state in (State.STARTING, State.RESTARTING)

    # -- what ranks do

    @precondition(lambda self: self.starts)
    @rule(rank=ranks)
    def ready(self, rank: int) -> None:
        if rank in self.alive and rank not in self.group.ready_ranks and self.starts:
            self.perform(self.group.rank_ready(rank))

    @precondition(lambda self: self.starts)
    @rule()
    def all_ready(self) -> None:
        for rank in range(RANKS):
            self.ready(rank)

    @precondition(lambda self: self.starts)
    @rule(rank=ranks, peer=st.booleans())
    def setup_raises(self, rank: int, peer: bool) -> None:
        if rank in self.alive and rank not in self.group.ready_ranks:
            self.perform(self.group.setup_failed(rank, SetupFailed("no", rank=rank), peer=peer, now=self.now))

    @precondition(lambda self: self.owing and not self.dying)
    @rule(rank=ranks, kind=st.sampled_from(["ok", "raise", "peer", "stop"]), collectives=st.integers(0, 1))
    def answer(self, rank: int, kind: str, collectives: int) -> None:
        if rank not in self.owing or self.dying or rank not in self.alive:
            return
        self.owing.discard(rank)
        error = WorkerError("x", rank=rank) if kind in ("raise", "peer") else None
        self.answers[rank] = do.Answer(collectives, error, kind == "peer", 1 if kind == "stop" else None)
        self.perform(self.group.answered(rank, self.sequence, self.answers[rank], self.now))

    @precondition(lambda self: self.owing and not self.dying)
    @rule(raiser=st.none() | ranks, collectives=st.integers(0, 1))
    def all_answer(self, raiser: int | None, collectives: int) -> None:
        for rank in sorted(self.owing):
            self.answer(rank, "raise" if rank == raiser else "ok", collectives if rank == raiser else 1)

    @rule(rank=ranks)
    def late_answer(self, rank: int) -> None:
        self.perform(self.group.answered(rank, 1 << 31, do.Answer(), self.now))

    @precondition(lambda self: self.alive)
    @rule(rank=ranks)
    def exits(self, rank: int) -> None:
        if rank in self.alive:
            self.alive.discard(rank)
            self.owing.discard(rank)
            if self.tearing_down and not self.dying:
                self.perform(self.group.torn_down(rank, None))
            self.perform(self.group.exited(rank, RankLost(rank, signal=9), self.now))

    @precondition(lambda self: self.present and (self.dying or (self.tearing_down and not self.alive)))
    @rule()
    def gone(self) -> None:
        if self.present and (self.dying or (self.tearing_down and not self.alive)):
            self.present = False
            self.alive.clear()
            self.owing.clear()
            self.perform(self.group.gone())

    # -- what callers and time do

    @rule(caller=st.sampled_from("ab"))
    def submit(self, caller: str) -> None:
        if self.group.accepts and not (self.group.queue.full and not self.group.idle):
            number = len(self.accepted) + 1
            self.accepted.add(number)
            self.perform(self.group.submit(number, caller))

    @precondition(lambda self: self.accepted != set(self.ended))
    @rule(number=st.integers(1, 8))
    def cancel(self, number: int) -> None:
        if number in self.accepted:
            self.perform(self.group.cancel(number, RequestCancelled()))

    @precondition(lambda self: self.accepted != set(self.ended))
    @rule(number=st.integers(1, 8), waiting_only=st.booleans())
    def expire(self, number: int, waiting_only: bool) -> None:
        if number in self.accepted:
            self.perform(self.group.expired(number, waiting_only=waiting_only))

    @precondition(lambda self: self.timers)
    @rule()
    def time_passes(self) -> None:
        if self.timers:
            timer = min(self.timers, key=lambda name: self.timers[name])
            self.now = max(self.now, self.timers.pop(timer))
            self.perform(self.group.fired(timer, self.now))  # type: ignore[arg-type]

    @precondition(lambda self: self.group.state != State.STOPPED and self.restarted + len(self.ended) > 2)
    @rule()
    def stop(self) -> None:
        self.perform(self.group.stop())

    @rule()
    def reload(self) -> None:
        self.perform(self.group.renew())

    # -- what must hold

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "group"):
            return
        waiting = set(self.group.queue)
        running = {self.group.flight.number} if self.group.flight and not self.group.flight.resolved else set()
        assert waiting | running | set(self.ended) == self.accepted, "a request was forgotten"
        assert not waiting & set(self.ended)
        assert self.stopped <= 1
        assert self.restarted <= self.group.restart.max_restarts
        assert self.gave_up <= 1
        if self.group.state == State.STOPPING and self.owing and not self.dying:
            assert self.asked_to_stop == self.sequence, "a stop that waits for a request which nobody told to end"

    def teardown(self) -> None:
        """Nothing bad happens any more: then everything comes to an end."""
        if not hasattr(self, "group"):
            return
        for _ in range(200):
            if self.group.state in (State.STOPPED, State.FAILED) and not self.present:
                break
            if self.dying:
                self.gone()
            for rank in range(RANKS):
                self.ready(rank)
                if not self.stubborn:
                    self.answer(rank, "ok", 0)
            if self.stubborn and self.group.flight is not None:
                self.expire(self.group.flight.number, waiting_only=False)
            if self.tearing_down and not self.dying:
                for rank in range(RANKS):
                    self.exits(rank)
                self.gone()
            self.time_passes()
            if self.group.state == State.READY and set(self.ended) == self.accepted:
                break
        assert set(self.ended) == self.accepted, f"{self.group.state}: some requests never end"
        assert self.group.state in (State.READY, State.STOPPED, State.FAILED)
        assert self.stopped == (self.group.state == State.STOPPED)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=60)
