"""The shared page: every word has its place, all mappings see the same, and writers do not get in each other's way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from drumline.page import Page, create_file

RANKS = 3
CACHE_LINE = 64


@pytest.fixture
def pages() -> Iterator[tuple[Page, Page]]:
    """The same page, mapped twice: as the runner has it, and as a rank has it."""
    descriptor = create_file("page-test", Page.size(RANKS))
    runner, rank = Page(descriptor, RANKS), Page(descriptor, RANKS)
    os.close(descriptor)  # the mappings are enough
    yield runner, rank
    runner.close()
    rank.close()


def test_a_new_page_says_nothing(pages: tuple[Page, Page]) -> None:
    runner, _ = pages
    assert runner.wanted == runner.decision == 0
    for rank in range(RANKS):
        assert (runner.last_sign(rank), runner.step(rank), runner.sequence(rank)) == (0.0, 0, 0)


def test_what_ranks_write_the_runner_reads(pages: tuple[Page, Page]) -> None:
    runner, mine = pages
    for rank in range(RANKS):
        before = time.monotonic()
        mine.begin(rank, 10 + rank)
        assert (runner.sequence(rank), runner.step(rank)) == (10 + rank, 0)
        mine.reach(rank, 5 + rank)
        assert (runner.sequence(rank), runner.step(rank)) == (10 + rank, 5 + rank)
        assert before <= runner.last_sign(rank) <= time.monotonic()
    mine.begin(1, 0)
    assert [runner.sequence(rank) for rank in range(RANKS)] == [10, 0, 12]
    assert [runner.step(rank) for rank in range(RANKS)] == [5, 0, 7]


def test_every_sign_of_progress_is_a_heartbeat(pages: tuple[Page, Page]) -> None:
    runner, mine = pages
    last = 0.0
    signs: list[Callable[[], None]] = [lambda: mine.beat(2), lambda: mine.begin(2, 1), lambda: mine.reach(2, 1)]
    for sign in signs:
        sign()
        now = runner.last_sign(2)
        assert now > last
        last = now
    assert runner.last_sign(0) == runner.last_sign(1) == 0.0


def test_what_the_runner_and_rank_0_decide_everybody_reads(pages: tuple[Page, Page]) -> None:
    runner, mine = pages
    runner.request_stop((1 << 32) - 1)
    assert mine.wanted == (1 << 32) - 1
    mine.decision = (1 << 64) - 1
    assert runner.decision == (1 << 64) - 1
    assert mine.wanted == (1 << 32) - 1


def test_words_of_different_writers_lie_in_different_cache_lines() -> None:
    descriptor = create_file("page-test", Page.size(RANKS))
    page = Page(descriptor, RANKS)
    os.close(descriptor)

    def lines(write: Callable[[], None]) -> set[int]:
        before = page.words.tolist()
        write()
        return {at * 8 // CACHE_LINE for at, word in enumerate(page.words.tolist()) if word != before[at]}

    def decide() -> None:
        page.decision = 1

    def work(rank: int) -> Callable[[], None]:
        return lambda: (page.begin(rank, 7), page.reach(rank, 3))[0]

    writers = [lines(decide), lines(lambda: page.request_stop(1)), *(lines(work(rank)) for rank in range(RANKS))]
    assert all(len(found) == 1 for found in writers)
    assert len(set.union(*writers)) == len(writers)
    page.close()


def test_a_page_is_as_large_as_it_needs_to_be() -> None:
    assert Page.size(0) == 2 * CACHE_LINE
    assert Page.size(8) - Page.size(7) == CACHE_LINE


def test_a_file_without_a_name_vanishes_with_its_last_descriptor() -> None:
    descriptor = create_file("vanishes", 100)
    assert os.fstat(descriptor).st_size == 100
    assert not os.get_inheritable(descriptor)
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
