"""Every example on real ranks, against plain diffusers in one process: plain, streamed, cancelled and run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from drumline.distributed import DistributedRunner
from drumline.errors import InvalidPayload
from drumline.testing.strategies import check_cancels, check_stream, draw, largest_difference

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass
class Case:
    """An example and how near it comes to one process.

    Attributes:
        kind: of the pipeline in one process.
        request: for both.
        bound: largest difference of a pixel in 0..1, float32. 0 where the same sums are added in the same order. Else
            matrix products with another number of rows, or partial sums, are rounded differently in the last place.
        two: the example's setup on two ranks, None where it needs more.
        four: on four ranks.
        uneven: a change of the request that leaves tokens over, and what is said about it.
    """

    kind: str
    request: dict[str, Any]
    bound: float
    two: dict[str, Any] | None = field(default_factory=dict)
    four: dict[str, Any] | None = field(default_factory=dict)
    uneven: tuple[dict[str, Any], str] | None = None


FLUX = {"prompt": "a cat", "width": 64, "height": 96, "num_inference_steps": 6, "max_sequence_length": 32}
SD3 = {**FLUX, "negative_prompt": "rain", "max_sequence_length": 51, "guidance_scale": 4.5}
SDXL = {
    "prompt": "a cat",
    "negative_prompt": "rain",
    "width": 64,
    "height": 64,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
}
GUIDED = {**FLUX, "negative_prompt": "rain", "true_cfg_scale": 4.0, "guidance_scale": 1.0}
ODD_IMAGE = {"width": 80, "height": 80}
ALL_EXACT = 1000  # warm-up steps: the image is one patch at every step

CASES = {
    "flux_ulysses": Case("flux", FLUX, 5e-6, uneven=(ODD_IMAGE, "25 image tokens.*ulysses=2.*multiple of 32")),
    "flux_ring": Case("flux", FLUX, 5e-6, uneven=({"max_sequence_length": 31}, "31 text tokens.*ring=2: use 30 or 32")),
    "flux_usp": Case(
        "flux",
        FLUX,
        5e-6,
        two=None,
        uneven=({"max_sequence_length": 30}, "30 text tokens.*ring=2 x ulysses=2: use 28 or 32"),
    ),
    "sd3_ulysses": Case(
        "sd3", SD3, 5e-6, uneven=({"max_sequence_length": 52}, "129 text tokens.*ulysses=2: use 128 or 130")
    ),
    "flux_tensor": Case("flux", FLUX, 5e-6),
    "sdxl_cfg": Case("sdxl", SDXL, 2e-5, four=None),  # four ranks are two pairs, below
    "flux_pipefusion": Case(
        "flux",
        FLUX,
        0.0,
        two={"warmup": ALL_EXACT, "patches": 17},
        four={"warmup": ALL_EXACT},
        uneven=({"height": 64}, "16 image tokens, too few for 17 patches.*use at most 16 patches"),
    ),
    "flux_hybrid": Case(
        "flux",
        GUIDED,
        5e-6,
        two={"cfg": 1, "pipefusion": 1, "ulysses": 2, "warmup": ALL_EXACT},
        four={"cfg": 2, "pipefusion": 2, "ulysses": 1, "warmup": ALL_EXACT},
        uneven=(ODD_IMAGE, "25 image tokens.*ulysses=2.*multiple of 32"),
    ),
}
ON_TWO = [example for example, case in CASES.items() if case.two is not None]
ON_FOUR = [example for example, case in CASES.items() if case.four is not None]


def asked(example: str, ranks: int = 2, **more: Any) -> dict[str, Any]:
    setup = CASES[example].two if ranks == 2 else CASES[example].four
    return {"example": example, "setup": setup, **CASES[example].request, **more}


@pytest.mark.parametrize("example", ON_TWO)
async def test_two_ranks_draw_what_one_process_draws(two: DistributedRunner, one_process: Any, example: str) -> None:
    case = CASES[example]
    expected = one_process(case.kind, seed=7, **case.request)
    assert expected.std() > 0.05
    assert largest_difference(await draw(two, **asked(example, seed=7)), expected) <= case.bound


@pytest.mark.parametrize("example", ON_FOUR)
async def test_four_ranks_draw_what_one_process_draws(four: DistributedRunner, one_process: Any, example: str) -> None:
    case = CASES[example]
    expected = one_process(case.kind, seed=7, **case.request)
    assert largest_difference(await draw(four, **asked(example, 4, seed=7)), expected) <= case.bound


@pytest.mark.parametrize("example", ON_TWO)
async def test_without_a_seed_ranks_agree_on_one_and_tell_it(
    two: DistributedRunner, one_process: Any, example: str
) -> None:
    case = CASES[example]
    first, second = [await two.invoke(asked(example)) for _ in range(2)]
    assert first["seed"] != second["seed"]
    assert not torch.equal(first["image"], second["image"])
    expected = one_process(case.kind, seed=first["seed"], **case.request)
    assert largest_difference(first["image"], expected) <= case.bound


@pytest.mark.parametrize("example", ON_TWO)
async def test_streams_the_same(two: DistributedRunner, example: str) -> None:
    await check_stream(two, asked(example, num_inference_steps=7, seed=1), steps=7)


@pytest.mark.parametrize("example", ON_TWO)
async def test_cancelled_ranks_stop_at_one_step_and_leave_nothing_behind(two: DistributedRunner, example: str) -> None:
    short = asked(example, num_inference_steps=2, seed=5)
    await check_cancels(two, asked(example, num_inference_steps=12), short, steps=12)


@pytest.mark.parametrize("example", [example for example, case in CASES.items() if case.uneven is not None])
async def test_uneven_tokens_are_refused_with_their_number(
    two: DistributedRunner, four: DistributedRunner, example: str
) -> None:
    uneven = CASES[example].uneven
    assert uneven is not None
    change, message = uneven
    ranks = 4 if CASES[example].two is None else 2
    runner = four if ranks == 4 else two
    with pytest.raises(InvalidPayload, match=message):
        await runner.invoke(asked(example, ranks, **change))
    assert runner.status.restarts == 0


@pytest.mark.parametrize("example", ON_FOUR)
async def test_four_ranks_stream_the_same(four: DistributedRunner, example: str) -> None:
    await check_stream(four, asked(example, 4, num_inference_steps=6, seed=1), steps=6)


@pytest.mark.parametrize("example", ON_FOUR)
async def test_four_ranks_stop_at_one_step_too(four: DistributedRunner, example: str) -> None:
    short = asked(example, 4, num_inference_steps=2, seed=5)
    times = 5 if CASES[example].two is None else 3
    await check_cancels(four, asked(example, 4, num_inference_steps=12), short, steps=12, times=times)


# -- CFG parallelism


@pytest.mark.parametrize(
    "more",
    [{"num_images_per_prompt": 2}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}],
    ids=["two images", "no guidance", "two images, no guidance"],
)
async def test_a_pair_draws_what_one_process_draws_whatever_its_batch(
    two: DistributedRunner, one_process: Any, more: dict[str, Any]
) -> None:
    expected = one_process("sdxl", seed=7, **{**SDXL, **more})
    assert largest_difference(await draw(two, **asked("sdxl_cfg", **more, seed=7)), expected) <= 2e-5


async def test_two_pairs_draw_two_images(four: DistributedRunner, one_process: Any) -> None:
    images = await draw(four, example="sdxl_cfg", **SDXL, seed=7)
    expected = torch.cat([one_process("sdxl", seed=seed, **SDXL) for seed in (7, 8)])
    assert largest_difference(images, expected) <= 2e-5
    assert largest_difference(expected[:1], expected[1:]) > 0.1


# -- PipeFusion with patches, and its hybrids


@pytest.fixture
def simulated(one_process: Any) -> Any:
    """`simulated(patches=, warmup=, **request)`: the same patches in one process, without any group."""
    from diffusers import FluxPipeline

    from drumline.diffusion import FluxSampler, Groups, ParallelPlan
    from drumline.testing import tiny_flow

    def draw(*, patches: int, warmup: int, seed: int, **request: Any) -> torch.Tensor:
        pipeline = FluxPipeline.from_pretrained(tiny_flow.tiny_flow_models() / "flux")
        sampler = FluxSampler(pipeline, Groups(ParallelPlan()), patches=patches, warmup=warmup)
        images = sampler(**request, generator=torch.Generator().manual_seed(seed))
        assert images is not None
        return images

    return draw


LARGER = {"width": 128, "height": 128, "num_inference_steps": 8}


@pytest.mark.parametrize(("patches", "warmup"), [(4, 1), (3, 2), (8, 1)])
async def test_pipefusion_is_its_own_simulation_exactly(
    two: DistributedRunner, four: DistributedRunner, simulated: Any, one_process: Any, patches: int, warmup: int
) -> None:
    request = {**FLUX, **LARGER, "seed": 7}
    setup = {"patches": patches, "warmup": warmup}
    expected = simulated(**request, **setup)
    for runner in (two, four):
        assert torch.equal(await draw(runner, example="flux_pipefusion", setup=setup, **request), expected)
    # Patches attend to what is one step old: an approximation, of this size for this model.
    exact = one_process("flux", **request)
    error = (expected - exact).abs()
    assert 1e-6 < error.mean() < 2e-4
    assert error.max() < 2e-3


async def test_more_warm_up_is_nearer_to_exact(simulated: Any, one_process: Any) -> None:
    request = {**FLUX, **LARGER, "seed": 7}
    exact = one_process("flux", **request)
    errors = [float((simulated(**request, patches=4, warmup=n) - exact).abs().mean()) for n in (1, 4, 7, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


@pytest.mark.parametrize("plan", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
async def test_hybrids_are_their_own_simulation(
    two: DistributedRunner, four: DistributedRunner, simulated: Any, one_process: Any, plan: tuple[int, int, int]
) -> None:
    cfg, pipefusion, ulysses = plan
    runner = two if cfg * pipefusion * ulysses == 2 else four
    request = {**GUIDED, **LARGER, "seed": 7}
    setup = {"cfg": cfg, "pipefusion": pipefusion, "ulysses": ulysses, "patches": 4, "warmup": 2}
    expected = simulated(**request, patches=4, warmup=2)
    drawn = await draw(runner, example="flux_hybrid", setup=setup, **request)
    assert largest_difference(drawn, expected) <= 5e-6
    error = (expected - one_process("flux", **request)).abs()
    assert 1e-6 < error.mean() < 4e-4
    assert error.max() < 5e-3


async def test_all_three_on_eight_ranks(eight: DistributedRunner, simulated: Any) -> None:
    request = {**GUIDED, "seed": 7}
    drawn = await draw(eight, example="flux_hybrid", **request)  # as its manifest starts it
    assert largest_difference(drawn, simulated(**request, patches=4, warmup=2)) <= 5e-6


async def test_all_three_on_eight_ranks_stream_the_same_and_stop_at_one_step(eight: DistributedRunner) -> None:
    request = {"example": "flux_hybrid", **GUIDED}
    await check_stream(eight, {**request, "seed": 1}, steps=6)
    short = {**request, "num_inference_steps": 3, "seed": 5}  # one step with patches
    await check_cancels(eight, {**request, "num_inference_steps": 12}, short, steps=12, times=4)


async def test_cancelled_between_stages_leaves_no_patch_on_its_way(four: DistributedRunner) -> None:
    setup = {"cfg": 1, "pipefusion": 2, "ulysses": 2, "patches": 4, "warmup": 1}
    request = {"example": "flux_hybrid", "setup": setup, **GUIDED}
    short = {**request, "num_inference_steps": 3, "seed": 5}
    await check_cancels(four, {**request, "num_inference_steps": 10}, short, steps=10, times=8)


async def test_two_branches_need_two_prompts(two: DistributedRunner) -> None:
    request = {"example": "flux_hybrid", "setup": {"cfg": 2, "pipefusion": 1, "ulysses": 1}, **GUIDED}
    with pytest.raises(InvalidPayload, match=r"cfg=2 needs two branches.*true_cfg_scale above 1"):
        await two.invoke({**request, "true_cfg_scale": 1.0})
    assert two.status.restarts == 0
