"""examples/sdxl_cfg on real ranks, against plain diffusers in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch

from drumline.distributed import DistributedRunner
from drumline.testing.strategies import check_cancels, check_stream, draw, largest_difference

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST = {"prompt": "a cat", "negative_prompt": "rain", "width": 64, "height": 64, "num_inference_steps": 6}
#: The order of additions in matrix products differs with the size of the batch; float32, pixels in 0..1.
BOUND = 2e-5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(start: Callable[..., Awaitable[DistributedRunner]]) -> DistributedRunner:
    return await start("SdxlCfg", 2)


@pytest.mark.parametrize(
    "more",
    [{}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}],
    ids=["one", "two images", "no guidance", "two images, no guidance"],
)
async def test_a_pair_draws_what_one_process_draws(
    runner: DistributedRunner, one_process: Any, more: dict[str, Any]
) -> None:
    request = {**REQUEST, **more}
    expected = one_process("sdxl", seed=7, **{"guidance_scale": 5.0, **request})
    assert expected.std() > 0.05
    assert largest_difference(await draw(runner, **request, seed=7), expected) <= BOUND


async def test_two_pairs_draw_two_images(start: Callable[..., Awaitable[DistributedRunner]], one_process: Any) -> None:
    four = await start("SdxlCfg", 4)
    images = await draw(four, **REQUEST, seed=7)
    expected = torch.cat([one_process("sdxl", seed=seed, **REQUEST, guidance_scale=5.0) for seed in (7, 8)])
    assert largest_difference(images, expected) <= BOUND
    assert largest_difference(expected[:1], expected[1:]) > 0.1
    await four.stop()


async def test_without_a_seed_the_pair_agrees_on_one_and_tells_it(runner: DistributedRunner, one_process: Any) -> None:
    first, second = [await runner.invoke(REQUEST) for _ in range(2)]
    assert first["seed"] != second["seed"]
    expected = one_process("sdxl", seed=first["seed"], **REQUEST, guidance_scale=5.0)
    assert largest_difference(first["image"], expected) <= BOUND


async def test_streams_the_same(runner: DistributedRunner) -> None:
    await check_stream(runner, {**REQUEST, "num_inference_steps": 7, "seed": 1}, steps=7)


async def test_cancelled_ranks_stop_at_one_step(runner: DistributedRunner) -> None:
    short = {**REQUEST, "num_inference_steps": 2, "seed": 5}
    await check_cancels(runner, {**REQUEST, "num_inference_steps": 12}, short, steps=12)
