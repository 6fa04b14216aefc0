"""The step gate: whatever the ranks' relative speed, all leave a request at the same step."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from drumline.page import Page, create_file
from drumline.rank.gate import LAST_STEP, Gate, pack_decision, read_decision

sequences = st.integers(1, 2**32 - 1)
steps = st.integers(0, LAST_STEP)


@given(sequence=sequences, stop=steps, published=steps, follower=steps)
def test_no_follower_is_told_anything_but_what_rank_0_decides(
    sequence: int, stop: int, published: int, follower: int
) -> None:
    # Rank 0 publishes one decision per step until it stops; a follower may look at any moment.
    published = min(published, stop)
    said = read_decision(pack_decision(sequence, published, stop=published == stop), sequence, follower)
    assert said in {None, follower >= stop}
    # Nobody waits for ever: what rank 0 has passed, and everything once it has stopped, is decided.
    if follower <= published or published == stop:
        assert said is not None


@given(sequence=sequences, other=sequences, step=steps, follower=steps, stop=st.booleans())
def test_a_decision_about_another_request_says_nothing(
    sequence: int, other: int, step: int, follower: int, stop: bool
) -> None:
    if sequence != other:
        assert read_decision(pack_decision(other, step, stop), sequence, follower) is None


@contextmanager
def shared_page(world_size: int) -> Iterator[Page]:
    descriptor = create_file("gate-test", Page.size(world_size))
    page = Page(descriptor, world_size)
    try:
        yield page
    finally:
        page.close()
        os.close(descriptor)


def run_request(page: Page, sequence: int, length: int, stop_when: int, raises_at: int | None = None) -> list[int]:
    """Run ``length`` steps on every rank in threads; return the step at which each left (``length``: at its end).

    The runner asks for a stop when rank ``world_size - 1`` reaches ``stop_when``; rank 0 raises at ``raises_at``.
    """
    left = [-1] * page.world_size

    def rank(number: int) -> None:
        gate = Gate(page, number)
        gate.begin(sequence)
        failed = False
        left[number] = length
        for step in range(1, length + 1):
            if number == page.world_size - 1 and step == stop_when:
                page.request_stop(sequence)
            if number == 0 and step == raises_at:
                failed = True
                left[0] = step - 1
                break
            if gate.reach():
                failed = True
                left[number] = step
                break
        gate.end(failed=failed)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(page.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    return left


@given(
    world_size=st.integers(1, 4),
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4),
)
def test_all_ranks_leave_at_the_same_step(world_size: int, requests: list[tuple[int, int]]) -> None:
    with shared_page(world_size) as page:
        for sequence, (length, stop_when) in enumerate(requests, start=1):
            left = run_request(page, sequence, length, stop_when)
            assert len(set(left)) == 1, left
            if stop_when > length:
                assert left[0] == length, "nobody asked for a stop of this request"


@given(world_size=st.integers(2, 4), length=st.integers(2, 30), raises_at=st.integers(1, 30))
def test_followers_of_a_failed_rank_0_stop_at_the_step_that_it_did_not_reach(
    world_size: int, length: int, raises_at: int
) -> None:
    with shared_page(world_size) as page:
        left = run_request(page, 1, length, stop_when=length + 1, raises_at=raises_at)
    expected = min(raises_at, length)
    assert left[1:] == [expected] * (world_size - 1)
