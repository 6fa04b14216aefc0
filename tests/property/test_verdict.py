"""One death, one verdict: whatever order ranks tell their stories in, the caller hears the cause and not its consequences."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from drumline.contract import RestartSettings
from drumline.errors import DrumlineError, RankLost, RequestCancelled, SetupFailed, WorkerError
from drumline.runner import effects as do
from drumline.runner.state import Group, State

RANKS = 4


@dataclass
class Story:
    """What one rank says: ``ok``, ``stop``, ``real`` (its own error), ``peer`` (somebody else is gone), ``dies``."""

    rank: int
    kind: str


def stories(*kinds: str) -> st.SearchStrategy[list[Story]]:
    """One story per rank, in any order."""
    each = st.lists(st.sampled_from(kinds), min_size=RANKS, max_size=RANKS)
    return st.tuples(each, st.permutations(range(RANKS))).map(lambda t: [Story(rank, t[0][rank]) for rank in t[1]])


class Shell:
    """Performs effects as far as a verdict needs it; at most one verdict per request or start."""

    def __init__(self, *, started: bool) -> None:
        self.group = Group(
            RANKS, max_queue_depth=4, cancel_grace=60, restart=RestartSettings(max_restarts=5, backoff_seconds=0)
        )
        self.armed: set[str] = set()
        self.verdicts: list[DrumlineError | None] = []
        self.killed = 0
        self.perform(self.group.start())
        if started:
            for rank in range(RANKS):
                self.perform(self.group.rank_ready(rank))
            assert self.group.state == State.READY
            self.verdicts.clear()
            self.perform(self.group.submit(1, ""))

    def perform(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.Resolve() | do.Started():
                    self.verdicts.append(effect.error)
                case do.Arm():
                    self.armed.add(effect.timer)
                case do.Disarm():
                    self.armed.discard(effect.timer)
                case do.Kill():
                    self.killed += 1

    def fire(self) -> None:
        if "verdict" in self.armed:
            self.armed.discard("verdict")
            self.perform(self.group.fired("verdict", 1.0))


def error_of(story: Story) -> DrumlineError:
    if story.kind == "dies":
        return RankLost(story.rank, signal=9)
    return WorkerError(f"{story.kind} of {story.rank}", rank=story.rank)


def tell(shell: Shell, story: Story) -> DrumlineError | None:
    """Let the rank of ``story`` leave the request; return its error."""
    group = shell.group
    error = None if story.kind in ("ok", "stop") else error_of(story)
    if isinstance(error, RankLost):
        shell.perform(group.exited(story.rank, error, 0.0))
    else:
        step = 3 if story.kind == "stop" else None
        shell.perform(group.answered(story.rank, 1, do.Answer(0, error, story.kind == "peer", step), 0.0))
    return error


@given(told=stories("ok", "real", "peer", "dies"))
def test_the_first_cause_is_the_verdict_on_a_request(told: list[Story]) -> None:
    shell = Shell(started=True)
    causes, consequences = [], []
    for story in told:
        error = tell(shell, story)
        if error is not None:
            (consequences if story.kind == "peer" else causes).append(error)
        if causes:
            assert shell.verdicts == [causes[0]], "the cause is told at once, and once"
    if not causes:
        # Everybody has answered: there is no other story to wait for.
        assert shell.verdicts == ([consequences[0]] if consequences else [None])
    shell.fire()
    assert len(shell.verdicts) == 1
    dead = any(story.kind == "dies" for story in told)
    assert shell.killed == int(dead)
    assert (shell.group.state == State.READY) == (not dead)


@given(told=stories("ok", "real", "peer", "dies"), patience=st.integers(1, RANKS))
def test_a_cause_that_is_not_told_in_time_is_not_waited_for(told: list[Story], patience: int) -> None:
    shell = Shell(started=True)
    said: list[tuple[str, DrumlineError]] = []
    for count, story in enumerate(told, start=1):
        error = tell(shell, story)
        if error is not None:
            said.append((story.kind, error))
        if count == patience:
            in_time = list(said)
            shell.fire()
    causes = [error for kind, error in in_time if kind != "peer"]
    if causes or in_time:
        assert shell.verdicts == [causes[0] if causes else in_time[0][1]]
    assert len(shell.verdicts) == 1


@given(told=stories("ok", "stop", "real", "peer"), cancel_after=st.integers(0, RANKS))
def test_a_cancelled_request_ends_as_cancelled_unless_a_rank_failed(told: list[Story], cancel_after: int) -> None:
    shell = Shell(started=True)
    reason = RequestCancelled("enough")
    errors = []
    for count, story in enumerate(told):
        if count == cancel_after:
            shell.perform(shell.group.cancel(1, reason))
        error = tell(shell, story)
        if error is not None:
            errors.append((story.kind, error))
    [verdict] = shell.verdicts
    causes = [error for kind, error in errors if kind == "real"]
    if causes:
        assert verdict is causes[0]
    elif errors:
        assert verdict is errors[0][1]
    elif any(story.kind == "stop" for story in told):
        assert isinstance(verdict, RequestCancelled)
        assert verdict.step == 3
        assert str(verdict) == ("enough" if cancel_after < RANKS else str(RequestCancelled()))
    else:
        assert verdict is None, "it was over before it could be cancelled"
    assert shell.killed == 0


@given(
    told=stories("ready", "real", "peer", "dies"), exits=st.permutations(range(RANKS)), patience=st.integers(0, RANKS)
)
def test_the_first_cause_is_the_verdict_on_a_start(told: list[Story], exits: list[int], patience: int) -> None:
    shell = Shell(started=False)
    group = shell.group
    causes: list[DrumlineError] = []
    peers: list[DrumlineError] = []
    for count, story in enumerate(told):
        if count == patience and peers and not causes:
            shell.fire()
            causes.append(peers[0])  # nobody told a better story in time
        match story.kind:
            case "ready":
                shell.perform(group.rank_ready(story.rank))
            case "dies":
                causes.append(RankLost(story.rank, exit_code=1))
                shell.perform(group.exited(story.rank, causes[-1], 0.0))
            case kind:
                error = SetupFailed(f"{kind} of {story.rank}", rank=story.rank)
                (peers if kind == "peer" else causes).append(error)
                shell.perform(group.setup_failed(story.rank, error, peer=kind == "peer", now=0.0))
    # Ranks whose setup failed end by themselves; that is no new story.
    failed = {story.rank for story in told if story.kind in ("real", "peer")}
    for rank in exits:
        if rank in failed:
            shell.perform(group.exited(rank, RankLost(rank, exit_code=3), 0.0))
    shell.fire()
    if not causes and not peers:
        assert shell.verdicts == [None]
        assert group.state == State.READY
        return
    expected = causes[0] if causes else peers[0]
    assert group.last_failure is expected
    assert group.state == State.FAILED
    assert shell.verdicts == [], "told when every process has ended"
    shell.perform(group.gone())
    assert shell.verdicts == [expected]
