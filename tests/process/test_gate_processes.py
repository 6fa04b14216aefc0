"""The step gate between real processes, which run truly at the same time and at speeds of their own."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from drumline.page import Page, create_file

RANKS = 4
SEED = 20_240

#: One rank: for each line ``[sequence, steps, seed, raises_at]`` it runs a request and says at which step it left.
RANK = """
import json, random, sys, time
from drumline.page import Page
from drumline.rank.gate import Gate

descriptor, rank, ranks = map(int, sys.argv[1:])
gate = Gate(Page(descriptor, ranks), rank)
for line in sys.stdin:
    sequence, steps, seed, raises_at = json.loads(line)
    speed = random.Random(seed * 1000 + rank)
    gate.begin(sequence)
    left, failed, slow = steps, False, speed.choice([0, 0, 1e-4, 1e-3])
    for step in range(1, steps + 1):
        if step == raises_at:
            left, failed = step, True
            break
        if speed.random() < 0.3:
            time.sleep(speed.random() * slow)  # the work of a step
        if gate.reach():
            left, failed = step, True
            break
    gate.end(failed=failed)
    print(json.dumps([left, failed]), flush=True)
"""


class Ranks:
    """The runner's side: one page, one process per rank."""

    def __init__(self) -> None:
        descriptor = create_file("gate", Page.size(RANKS))
        self.page = Page(descriptor, RANKS)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(descriptor), str(rank), str(RANKS)],
                pass_fds=[descriptor],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(RANKS)
        ]
        os.close(descriptor)

    def begin(self, sequence: int, steps: list[int], raises: dict[int, int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            assert process.stdin is not None
            process.stdin.write(
                msgspec.json.encode([sequence, steps[rank], sequence, (raises or {}).get(rank, 0)]) + b"\n"
            )
            process.stdin.flush()

    def finish(self) -> list[tuple[int, bool]]:
        """Wait for every rank: the step at which it left, and whether it stopped or failed there."""
        answers: list[Any] = []
        for process in self.processes:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 20)[0], "a rank waits for ever"
            answers.append(tuple(msgspec.json.decode(process.stdout.readline())))
        return answers

    def wait_for_step(self, rank: int, step: int) -> None:
        while self.page.step(rank) < step and self.page.sequence(rank):
            os.sched_yield()

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            assert process.wait(20) == 0
            process.stdout.close()
        self.page.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def sequences() -> Iterator[int]:
    return iter(range(1, 1 << 31))


def test_all_ranks_leave_a_cancelled_request_at_the_same_step(ranks: Ranks, sequences: Iterator[int]) -> None:
    chance = random.Random(SEED)
    stopped = 0
    for _ in range(200):
        sequence = next(sequences)
        ranks.begin(sequence, [200] * RANKS)
        ranks.wait_for_step(chance.randrange(RANKS), chance.randrange(200))
        ranks.page.request_stop(sequence)
        answers = ranks.finish()
        assert len(set(answers)) == 1, answers
        stopped += answers[0][1]
    assert stopped > 20, "nearly all requests were over before they were cancelled: the test tests nothing"


def test_a_request_to_stop_an_older_request_is_ignored(ranks: Ranks, sequences: Iterator[int]) -> None:
    for _ in range(30):
        old, sequence = next(sequences), next(sequences)
        ranks.page.request_stop(old)
        ranks.begin(sequence, [50] * RANKS)
        ranks.wait_for_step(1, 10)
        ranks.page.request_stop(old)
        assert ranks.finish() == [(50, False)] * RANKS


def test_ranks_may_have_different_numbers_of_steps(ranks: Ranks, sequences: Iterator[int]) -> None:
    chance = random.Random(SEED)
    for _ in range(30):
        # Rank 0 ends early as a rule: its followers go on, and nobody waits for its next decision.
        steps = [chance.randrange(1, 20), *(chance.randrange(1, 100) for _ in range(RANKS - 1))]
        ranks.begin(next(sequences), steps)
        assert ranks.finish() == [(count, False) for count in steps]


def test_followers_of_a_rank_0_that_fails_stop_at_the_step_that_it_did_not_reach(
    ranks: Ranks, sequences: Iterator[int]
) -> None:
    chance = random.Random(SEED)
    for _ in range(30):
        at = chance.randrange(1, 60)
        ranks.begin(next(sequences), [60] * RANKS, {0: at})
        assert ranks.finish() == [(at, True)] * RANKS


def test_a_follower_that_fails_stops_nobody_by_itself(ranks: Ranks, sequences: Iterator[int]) -> None:
    for at in (1, 30, 60):
        ranks.begin(next(sequences), [60] * RANKS, {2: at})
        assert ranks.finish() == [(at, True) if rank == 2 else (60, False) for rank in range(RANKS)]
