"""examples/flux_ulysses on real ranks, against plain diffusers in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch

from drumline.distributed import DistributedRunner
from drumline.errors import InvalidPayload
from drumline.testing.strategies import check_cancels, check_stream, draw, largest_difference

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST = {"prompt": "a cat", "width": 64, "height": 96, "num_inference_steps": 6, "max_sequence_length": 32}
#: The order of additions in matrix products differs with the number of rows; float32, pixels in 0..1.
BOUND = 5e-6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(start: Callable[..., Awaitable[DistributedRunner]]) -> DistributedRunner:
    return await start("FluxUlysses", 2)


async def test_two_ranks_draw_what_one_process_draws(runner: DistributedRunner, one_process: Any) -> None:
    expected = one_process("flux", seed=7, **REQUEST)
    assert expected.std() > 0.05
    assert largest_difference(await draw(runner, **REQUEST, seed=7), expected) <= BOUND


async def test_four_ranks_too(start: Callable[..., Awaitable[DistributedRunner]], one_process: Any) -> None:
    four = await start("FluxUlysses", 4)
    assert largest_difference(await draw(four, **REQUEST, seed=7), one_process("flux", seed=7, **REQUEST)) <= BOUND
    await four.stop()


async def test_without_a_seed_ranks_agree_on_one_and_tell_it(runner: DistributedRunner, one_process: Any) -> None:
    first, second = [await runner.invoke(REQUEST) for _ in range(2)]
    assert first["seed"] != second["seed"]
    assert not torch.equal(first["image"], second["image"])
    assert largest_difference(first["image"], one_process("flux", seed=first["seed"], **REQUEST)) <= BOUND


async def test_streams_the_same(runner: DistributedRunner) -> None:
    await check_stream(runner, {**REQUEST, "num_inference_steps": 7, "seed": 1}, steps=7)


async def test_cancelled_ranks_stop_at_one_step(runner: DistributedRunner) -> None:
    short = {**REQUEST, "num_inference_steps": 2, "seed": 5}
    await check_cancels(runner, {**REQUEST, "num_inference_steps": 12}, short, steps=12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 80, "height": 80}, "25 image tokens.*ulysses=2.*multiple of 32"),
        ({"max_sequence_length": 31}, "31 text tokens.*ulysses=2: use 30 or 32"),
    ],
)
async def test_uneven_tokens_are_refused_with_their_number(
    runner: DistributedRunner, wrong: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidPayload, match=message):
        await runner.invoke({**REQUEST, **wrong})
    assert runner.status.restarts == 0
