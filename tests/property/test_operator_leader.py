"""Leader election: candidates with clocks, delays and failures of their own; never two at a time, and soon one again."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from drumline_operator.leader import Candidate, Record, record_of, spec_of

DURATION, DEADLINE, RETRY = 15, 10.0, 2.0
#: A call that takes longer than this was given up by its caller, but may be done all the same.
PATIENCE = 15.0


class Server:
    """One Lease with optimistic locking."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.version = 0

    def write(self, record: Record, version: int) -> bool:
        if version != self.version:
            return False
        self.record, self.version = record, self.version + 1
        return True


class Simulation:
    """Real time goes on in events; each candidate sees it through a clock that is off and runs fast or slow."""

    def __init__(self, draw: Callable[[str], float]) -> None:
        self.draw, self.server, self.now = draw, Server(), 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.leaders: list[tuple[float, str]] = []

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.count), call))

    def run(self, end: float, check: Callable[[], None]) -> None:
        while self.events and self.events[0][0] <= end:
            self.now, _, call = heapq.heappop(self.events)
            call()
            check()


class Member:
    """One candidate with its clock."""

    def __init__(self, world: Simulation, name: str, offset: float, rate: float) -> None:
        self.world, self.offset, self.rate = world, offset, rate
        self.candidate = Candidate(name, DURATION, DEADLINE)
        self.alive, self.broken = True, False

    @property
    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    @property
    def leads(self) -> bool:
        return self.alive and self.candidate.leading(self.clock)

    def attempt(self) -> None:
        """Read, decide, write; each way takes its time, and what takes too long is not waited for but may be done."""
        if not self.alive:
            return
        world, server, began = self.world, self.world.server, self.clock
        ways = [world.draw("delay") for _ in range(4)]
        given_up = world.now + PATIENCE

        def read() -> None:
            found, version = server.record, server.version
            world.at(world.now + ways[1], lambda: decide(found, version))

        def decide(found: Record | None, version: int) -> None:
            if world.now > given_up or self.broken or not self.alive:
                return
            wanted = self.candidate.decide(found, f"{self.clock}", self.clock)
            if wanted is not None:
                world.at(world.now + ways[2], lambda: write(wanted.record, version))

        def write(record: Record, version: int) -> None:
            if server.write(record, version):
                world.at(world.now + ways[3], lambda: wrote(record))

        def wrote(record: Record) -> None:
            if world.now <= given_up:
                self.candidate.wrote(record, began)

        if not self.broken:
            world.at(world.now + ways[0], read)
        world.at(world.now + RETRY + min(sum(ways), PATIENCE), self.attempt)


@given(st.data())
def test_never_two_and_soon_one_again(data: st.DataObject) -> None:
    delays = st.floats(0, 8, allow_nan=False)
    quiet = False

    def draw(_: str) -> float:
        return 0.01 if quiet else data.draw(delays)

    world = Simulation(draw)
    members = [
        Member(world, name, data.draw(st.floats(-1e6, 1e6)), data.draw(st.floats(0.9, 1.1))) for name in ("a", "b", "c")
    ]

    def check() -> None:
        leading = [each.candidate.identity for each in members if each.leads]
        assert len(leading) <= 1, leading

    for member in members:
        world.at(data.draw(st.floats(0, 5)), member.attempt)
    for time in (30.0, 60.0, 90.0):
        world.run(time, check)
        victim = data.draw(st.sampled_from(members))
        match data.draw(st.sampled_from(["cut off", "heal", "kill", "nothing"])):
            case "cut off":
                victim.broken = True
            case "heal":
                victim.broken = False
            case "kill" if sum(each.alive for each in members) > 1:
                victim.alive = False
    for member in members:
        member.broken = False
    quiet = True
    # What was on its way, the Lease of one that is gone, and two attempts.
    world.run(90.0 + 32.0 + PATIENCE + DURATION / 0.9 + 2 * (RETRY + 1) / 0.9 + 1, check)
    assert any(member.leads for member in members)


def test_a_released_lease_is_free_at_once() -> None:
    one, two = (Candidate(name, DURATION, DEADLINE) for name in ("one", "two"))
    first = one.decide(None, "t0", 0.0)
    assert first is not None
    assert first.fresh
    one.wrote(first.record, 0.0)
    assert two.decide(first.record, "t1", 100.0) is None
    released = one.release("t2")
    assert released is not None
    one.stopped()
    assert not one.leading(0.1)
    taken = two.decide(released, "t3", 100.1)
    assert taken is not None
    assert (taken.record.holder, taken.record.transitions) == ("two", 1)
    assert two.release("t4") is None


def test_what_its_clock_says_does_not_matter() -> None:
    """A record with a time long past is still watched for a whole duration before it counts as dead."""
    candidate = Candidate("me", DURATION, DEADLINE)
    record = Record("other", DURATION, "1999-01-01T00:00:00.000000Z", "1999-01-01T00:00:00.000000Z")
    assert candidate.decide(record, "now", 0.0) is None
    assert candidate.decide(record, "now", 14.9) is None
    assert candidate.decide(record, "now", 15.0) is not None


@given(st.builds(Record, st.text(), st.integers(1, 60), st.text(), st.text(), st.integers(0, 9)))
def test_there_and_back(record: Record) -> None:
    assert record_of(spec_of(record)) == record
