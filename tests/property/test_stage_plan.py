"""Pipeline stages hold every layer once; a plan that torch would refuse is refused first, with the number to change."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drumline.errors import ConfigurationError, InvalidPayload
from drumline.training.meter import Pace, warmup_cosine
from drumline.training.stage_plan import SCHEDULES, StagePlan


@given(st.integers(1, 200), st.integers(1, 16), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 64))
def test_every_layer_is_on_one_rank_and_the_shares_are_even(
    layers: int, ranks: int, schedule: str, microbatches: int
) -> None:
    try:
        plan = StagePlan(layers, ranks, schedule, microbatches)
    except ConfigurationError:
        return
    held = {rank: [i for stage in plan.stages_of(rank) for i in plan.layers_of(stage)] for rank in range(ranks)}
    assert sorted(i for each in held.values() for i in each) == list(range(layers))
    assert [i for stage in range(plan.stages) for i in plan.layers_of(stage)] == list(range(layers))
    sizes = [len(plan.layers_of(stage)) for stage in range(plan.stages)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert 0 <= plan.bubble < 1


@given(st.integers(1, 64), st.integers(2, 16), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 32))
def test_the_cure_in_a_message_works(layers: int, ranks: int, schedule: str, microbatches: int) -> None:
    try:
        StagePlan(layers, ranks, schedule, microbatches)
    except ConfigurationError as error:
        text = str(error)
        if "use at most" in text:
            fewer = int(text.split("use at most ")[1].split()[0])
            if fewer:
                StagePlan(layers, fewer, schedule, fewer)
        elif "multiple of" in text:
            StagePlan(layers, ranks, schedule, ranks * microbatches)
        else:
            StagePlan(layers, ranks, schedule, int(text.split("needs at least ")[1].split(",")[0]))


@given(st.integers(1, 1000), st.integers(1, 64))
def test_a_batch_is_cut_evenly_or_refused_with_the_next_that_can(batch: int, microbatches: int) -> None:
    plan = StagePlan(1, 1, "gpipe", microbatches)
    try:
        plan.check_batch(batch)
    except InvalidPayload as error:
        cure = int(str(error).rsplit("use ", 1)[1])
        assert cure - microbatches < batch < cure
        plan.check_batch(cure)
    else:
        assert batch % microbatches == 0


def test_unknown_schedules_are_named() -> None:
    with pytest.raises(ConfigurationError, match="schedule: 'ring' is none of gpipe, 1f1b, interleaved, zero-bubble"):
        StagePlan(8, 2, "ring")


def test_a_known_bubble() -> None:
    assert StagePlan(8, 4, "1f1b", 4).bubble == 3 / 7
    assert StagePlan(8, 4, "interleaved", 4).bubble == 3 / 11


@given(st.integers(1, 500), st.integers(0, 100), st.floats(1e-6, 1), st.floats(0, 1e-6))
@example(57, 57, 0.7301930787040583, 0.0)  # times 57, by 57, is more
@example(9, 0, 1.482110300310184e-05, 6.452473877751074e-08)  # less the floor, plus the floor, is another one
def test_the_rate_goes_up_then_down_within_its_bounds(total: int, warmup: int, peak: float, floor: float) -> None:
    rates = [warmup_cosine(step, total=total, peak=peak, warmup=warmup, floor=floor) for step in range(total)]
    assert all(0 < rate <= peak for rate in rates)
    top = min(warmup, total)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if total > warmup:
        assert rates[warmup] == peak


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=50), st.integers(1, 30))
def test_time_left_follows_the_latest_steps(seconds: list[float], window: int) -> None:
    pace, now = Pace(window), 0.0
    pace.mark(0, now)
    assert pace.seconds_left(10) is None
    for step, each in enumerate(seconds, 1):
        now += each
        pace.mark(step, now)
    latest = seconds[-window:]
    expected = sum(latest) / len(latest)
    assert pace.steps_per_second == pytest.approx(1 / expected, rel=1e-6)
    assert pace.seconds_left(len(seconds) + 7) == pytest.approx(7 * expected, rel=1e-6)
    assert pace.seconds_left(len(seconds) - 1) == 0
