"""The parallel SDXL example on two real ranks, against plain diffusers in one process; and the demo."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drumline.distributed import DistributedRunner
from drumline.errors import RequestCancelled

pytestmark = pytest.mark.asyncio(loop_scope="session")

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "parallel_sdxl"
RANKS = 2
IMAGE: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "rain",
    "width": 64,
    "height": 64,
    "num_inference_steps": 4,
}
REQUEST = {"example": "parallel_sdxl", **IMAGE}
CANCELS = 200


@pytest.fixture
def runner(two: DistributedRunner) -> DistributedRunner:
    return two


async def draw(runner: DistributedRunner, **request: Any) -> np.ndarray:
    result = await runner.invoke({**REQUEST, **request}, timeout=60)
    images: np.ndarray = result["image"].numpy()
    assert images.shape == (len(runner.status.ranks), 3, 64, 64)
    return images


async def test_without_a_seed_ranks_and_requests_draw_different_images(runner: DistributedRunner) -> None:
    drawn = [image for _ in range(2) for image in await draw(runner)]
    for i, image in enumerate(drawn):
        for other in drawn[:i]:
            assert np.abs(image - other).max() > 0.01


async def test_with_seeds_each_rank_draws_exactly_what_one_process_draws(
    runner: DistributedRunner, tmp_path: Path
) -> None:
    from drumline.testing.tiny import tiny_models

    out = tmp_path / "images.npy"
    command = [sys.executable, HERE / "one_process_sdxl.py", tiny_models() / "sdxl", out, json.dumps(IMAGE)]
    process = await asyncio.create_subprocess_exec(*map(str, command), "7", "8")
    assert await asyncio.wait_for(process.wait(), 120) == 0
    assert np.abs(await draw(runner, seed=7) - np.load(out)).max() == 0.0


async def test_four_ranks_draw_exactly_what_one_process_draws(four: DistributedRunner, one_process: Any) -> None:
    expected = np.concatenate([one_process("sdxl", seed=seed, **IMAGE).numpy() for seed in range(7, 11)])
    assert np.abs(await draw(four, seed=7) - expected).max() == 0.0


async def test_streams_progress_and_previews_in_order_and_ends_with_the_same_result(runner: DistributedRunner) -> None:
    request = {**REQUEST, "num_inference_steps": 11, "seed": 1}
    *updates, result = [event async for event in runner.stream(request, timeout=60)]
    kinds = [update["progress"]["done"] if "progress" in update else "preview" for update in updates]
    assert kinds == [1, "preview", 2, 3, 4, 5, 6, "preview", 7, 8, 9, 10, 11, "preview"]
    assert all(update["progress"]["total"] == 11 for update in updates if "progress" in update)
    previews = [update["image"] for update in updates if "image" in update]
    assert [preview.size for preview in previews] == [(RANKS * 64, 64)] * 3
    assert len({preview.tobytes() for preview in previews}) == 3
    assert np.array_equal(result["image"].numpy(), await draw(runner, num_inference_steps=11, seed=1))


async def test_a_cancelled_pipeline_stops_on_all_ranks_at_one_step_and_leaves_nothing_behind(
    runner: DistributedRunner,
) -> None:
    long = {**REQUEST, "num_inference_steps": 12, "seed": 3}
    short: dict[str, Any] = {"num_inference_steps": 2, "seed": 5}
    expected = await draw(runner, **short)
    started = time.monotonic()
    await runner.invoke(long)
    full = time.monotonic() - started
    chance = random.Random(20)
    steps: list[int] = []
    tries = 0
    while len(steps) < CANCELS:
        tries += 1
        assert tries <= 4 * CANCELS, f"only {len(steps)} requests were cancelled before their end"
        started = time.monotonic()
        ticket = runner.submit(long, streaming=bool(tries % 2))
        timer = asyncio.get_running_loop().call_later(chance.uniform(0, 0.9) * full, ticket.cancel)
        try:
            await ticket.result()
            full = min(full, time.monotonic() - started)  # the machine was busier when this was measured
        except RequestCancelled as error:
            if ticket.stopped_steps:  # else: it was cancelled before a rank had seen it
                assert set(ticket.stopped_steps) == set(range(RANKS))
                assert set(ticket.stopped_steps.values()) == {error.step}
                assert error.step is not None
                steps.append(error.step)
        finally:
            timer.cancel()
        assert np.array_equal(await draw(runner, **short), expected), f"after a cancel at step {steps[-1:]}"
    assert all(1 <= step <= 12 for step in steps)
    assert len(set(steps)) > 5, "cancels came at all times"
    assert runner.status.restarts == 0


async def test_the_demo_runs_and_leaves_pictures(one_thread: None, tmp_path: Path) -> None:
    command = [
        sys.executable,
        EXAMPLE / "demo.py",
        "--out",
        tmp_path,
        "--size",
        "64",
        "--steps",
        "7",
        "--timeout",
        "200",
    ]
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "DRUMLINE_DEVICE": "cpu"},
    )
    out, _ = await asyncio.wait_for(process.communicate(), 250)
    assert process.returncode == 0, out.decode()
    assert "\r" not in out.decode()
    assert b"no process left" in out
    for name in ("invoke.jpg", "preview-1.jpg", "preview-2.jpg", "stream.jpg"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (RANKS * 64, 64)
