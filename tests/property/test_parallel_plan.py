"""Parallel plans and patches: every rank has its place, and whatever passes the checks can be split."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.diffusion.patches import merged, patches_of, stage_blocks
from drumline.diffusion.plan import DIMENSIONS, ModelShape, ParallelPlan, PlanError
from drumline.errors import InvalidPayload

numbers = st.fixed_dictionaries({name: st.integers(1, 4) for name in DIMENSIONS})


@st.composite
def plans(draw: st.DrawFn) -> ParallelPlan:
    """Any plan that is not wrong in itself."""
    kind = draw(st.sampled_from(["sequence", "tensor", "pipefusion"]))
    given = {"data": draw(st.integers(1, 3)), "cfg": draw(st.integers(1, 2))}
    if kind == "tensor":
        given["tensor"] = draw(st.integers(1, 4))
    else:
        given["ulysses"] = draw(st.integers(1, 4))
        given["ring" if kind == "sequence" else "pipefusion"] = draw(st.integers(1, 4))
    return ParallelPlan(**given)


shapes = st.builds(
    ModelShape,
    name=st.just("SomeTransformer"),
    heads=st.none() | st.integers(1, 24),
    blocks=st.integers(0, 6),
    sequence=st.sampled_from(["diffusers", "drumline", None]),
    tensor_widths=st.just(()) | st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
    pipefusion=st.booleans(),
    guidance=st.sampled_from(["batched", "separate", None]),
    pixels_per_token=st.sampled_from([8, 16]),
)


@given(numbers)
def test_a_plan_is_refused_exactly_when_its_numbers_do_not_go_together(given: dict[str, int]) -> None:
    more = {name for name, value in given.items() if value > 1}
    wrong = (
        given["cfg"] > 2
        or {"ring", "pipefusion"} <= more
        or ("tensor" in more and more & {"ulysses", "ring", "pipefusion"})
    )
    if wrong:
        with pytest.raises(PlanError, match=r"\w+=\d"):
            ParallelPlan(**given)
    else:
        assert ParallelPlan(**given).world_size == prod(given.values())


@given(plans())
def test_every_rank_has_its_own_place(plan: ParallelPlan) -> None:
    places = [plan.place(rank) for rank in range(plan.world_size)]
    assert [plan.rank(place) for place in places] == list(range(plan.world_size))
    assert all(0 <= place[name] < size for place in places for name, size in zip(DIMENSIONS, plan.sizes, strict=True))


@given(plans())
def test_peers_divide_the_ranks_along_each_dimension(plan: ParallelPlan) -> None:
    for name, size in zip(DIMENSIONS, plan.sizes, strict=True):
        lines = {tuple(plan.peers(rank, name)) for rank in range(plan.world_size)}
        assert sorted(rank for line in lines for rank in line) == list(range(plan.world_size))
        for line in lines:
            assert len(line) == size
            assert [plan.place(rank)[name] for rank in line] == list(range(size))


@given(plans(), shapes, st.integers(1, 16))
def test_what_passes_can_be_split_and_what_does_not_says_which_number(
    plan: ParallelPlan, model: ModelShape, ranks: int
) -> None:
    try:
        plan.check(ranks, model)
    except PlanError as error:
        assert any(f"{name}={getattr(plan, name)}" in str(error) for name in DIMENSIONS) or str(ranks) in str(error)
        return
    assert plan.world_size == ranks
    assert plan.ulysses == 1 or (model.heads or 0) % plan.ulysses == 0
    assert plan.tensor == 1 or all(n % plan.tensor == 0 for n in (model.heads or 1, *model.tensor_widths))
    assert plan.pipefusion == 1 or (model.pipefusion and model.blocks >= plan.pipefusion)
    assert plan.sequence == 1 or model.sequence is not None
    assert plan.ring == 1 or model.sequence == "diffusers"
    assert plan.cfg == 1 or model.guidance == "batched" or model.pipefusion


@given(plans(), shapes, st.integers(1, 40), st.integers(1, 40), st.integers(1, 80), st.integers(1, 9))
def test_requests_that_pass_have_whole_tokens_for_every_rank_and_patch(
    plan: ParallelPlan, model: ModelShape, across: int, down: int, text: int, patches: int
) -> None:
    size = {"width": across * 8, "height": down * 8}
    try:
        plan.check_request(model, **size, text_tokens=text, patches=patches)
    except InvalidPayload as error:
        assert any(str(number) in str(error) for number in (*size.values(), text))
        return
    if plan.sequence == patches == 1:
        return
    tokens = model.image_tokens(**size)
    split = patches_of(tokens, text, patches, plan.sequence)
    assert len(split) == patches
    for ranks in ([part for patch in split for rank in patch.image for part in rank], merged(split).image):
        flat = ranks if isinstance(ranks, list) else [part for rank in ranks for part in rank]
        assert sorted(token for part in flat for token in part) == list(range(tokens))
    for patch in split:
        # An all-to-all exchanges equal parts.
        assert len({sum(map(len, rank)) + len(words) for rank, words in zip(patch.image, patch.text, strict=True)}) == 1
        assert all(any(map(len, rank)) for rank in patch.image)
    assert sorted(word for rank in split[0].text for word in rank) == list(range(text))


@given(st.integers(1, 60), st.data())
def test_stages_hold_all_blocks_in_order_and_evenly(blocks: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, blocks))
    parts = [stage_blocks(blocks, stages, stage) for stage in range(stages)]
    assert [block for part in parts for block in part] == list(range(blocks))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
