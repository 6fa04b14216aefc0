"""Who leaves when there are too many connections."""

from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.problems import ProblemError
from drumline.server.connection_limit import ConnectionLimit, affordable


class Guest:
    def __init__(self) -> None:
        self.cut = False

    def abort(self) -> None:
        self.cut = True


def opened(limit: ConnectionLimit, count: int) -> list[Guest]:
    guests = [Guest() for _ in range(count)]
    for guest in guests:
        limit.opened(guest)
    return guests


def test_the_one_that_has_waited_longest_leaves() -> None:
    limit = ConnectionLimit(3)
    first, second, third = opened(limit, 3)
    limit.release(first)  # it was answered just now
    opened(limit, 1)
    assert (first.cut, second.cut, third.cut) == (False, True, False)
    opened(limit, 1)
    assert (first.cut, third.cut) == (False, True)


def test_who_has_a_call_in_hand_stays_and_the_newest_is_looked_at() -> None:
    limit = ConnectionLimit(2)
    busy = opened(limit, 2)
    for guest in busy:
        limit.hold(guest)
    [probe] = opened(limit, 1)
    assert not probe.cut
    with pytest.raises(ProblemError, match="All 2 connections") as refused:
        limit.hold(probe)
    assert refused.value.problem.status == 503
    [other] = opened(limit, 1)
    assert probe.cut
    assert not any(guest.cut for guest in busy)
    limit.release(busy[0])
    limit.hold(other)
    assert not other.cut


def test_who_was_cut_takes_no_place() -> None:
    limit = ConnectionLimit(1)
    first, second = opened(limit, 2)
    assert first.cut
    limit.hold(first)
    limit.release(first)
    limit.hold(second)
    limit.closed(second)
    limit.closed(first)
    assert not opened(limit, 1)[0].cut


@given(
    most=st.integers(1, 4),
    deeds=st.lists(st.tuples(st.sampled_from(["open", "hold", "release", "close"]), st.integers(0, 20)), max_size=60),
)
def test_never_more_than_one_above(most: int, deeds: list[tuple[str, int]]) -> None:
    limit = ConnectionLimit(most)
    guests: list[Guest] = []
    held: set[Guest] = set()
    for deed, number in deeds:
        living = [guest for guest in guests if not guest.cut]
        if deed == "open":
            guests += opened(limit, 1)
        elif living:
            guest = living[number % len(living)]
            if deed == "hold":
                if guest not in held and len(held) == most:
                    with pytest.raises(ProblemError):
                        limit.hold(guest)
                else:
                    limit.hold(guest)
                    held.add(guest)
            elif deed == "release":
                limit.release(guest)
                held.discard(guest)
            else:
                limit.closed(guest)
                guests.remove(guest)
                held.discard(guest)
        assert not any(guest.cut for guest in held)
        assert sum(not guest.cut for guest in guests) <= most + 1


def test_fewer_than_files_may_be_open() -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert affordable(8, 1) == 8
    assert affordable(allowed * 2, 2) < allowed - 64
    assert affordable(allowed * 2, 10**9) == 8
