"""What `drumline plan` says of the wire and of memory, against what the kernel counts as written by two ranks, and what they
hold (float32, gloo).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner
from drumline.planning import options
from drumline.planning.diffusion import Denoiser
from drumline.planning.language import LanguageModel
from drumline.planning.option import Machine, gather

HERE = Path(__file__).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two() -> AsyncIterator[DistributedRunner]:
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    runner = DistributedRunner(f"{HERE / 'wire_worker.py'}:Wire", world_size=2, device="cpu")
    await runner.start(timeout=250)
    yield runner
    await runner.stop()
    patch.undo()


TINY = LanguageModel("tiny", 8, 64, 128, 4, 4, 16, 258)
FLUX = Denoiser("tiny", "flux", 4, 16, 2, 4, 64, 32, 32, 16, batched=False, companions=0, distilled=True)


@pytest.mark.linux
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["data=2 (DDP)", "zero-1=2", "zero-2=2", "zero-3=2", "tensor=2", "pipeline=2"])
async def test_bytes_that_a_training_step_sends(two: DistributedRunner, way: str) -> None:
    batch, length = 8, 64
    found, _ = options.train(TINY, Machine(2, 1 << 34), batch, length, short=4)
    [planned] = [option.wire for option in found if option.plan.startswith(way)]
    if way in ("zero-2=2", "zero-3=2"):
        # gloo has no reduce-scatter of its own: it sums everything everywhere, which sends twice as much as NCCL's ring.
        planned += gather(4 * TINY.parameters, 2)
    measured = (await two.invoke({"way": way, "batch": batch, "length": length}, timeout=100))["sent"]
    assert sum(measured) / 2 == pytest.approx(planned, rel=0.1), measured


#: What the plan counts and nobody holds between two steps: DDP's buckets, and what FSDP gathers and sums for a while.
PASSING = {
    "data=2 (DDP)": 4 * TINY.parameters,
    "zero-1=2": 4 * TINY.parameters,
    "zero-2=2": 4 * TINY.parameters + 8 * TINY.layer,
    "zero-3=2": 8 * max(TINY.layer, TINY.embedding) + 8 * TINY.layer,
    "tensor=2": 0,
    "pipeline=2": 0,
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", PASSING)
async def test_bytes_that_a_rank_holds_while_it_trains(two: DistributedRunner, way: str) -> None:
    found, _ = options.train(TINY, Machine(2, 1 << 34), 8, 64, short=4)
    [planned] = [option for option in found if option.plan.startswith(way)]
    held = await two.invoke({"way": way, "batch": 8, "length": 64}, timeout=100)
    total = max(weights + state for weights, state in zip(held["weights"], held["state"], strict=True))
    assert total == pytest.approx(planned.weights + planned.state - PASSING[way], rel=0.02), held


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["ulysses=2", "ring=2", "tensor=2", "pipefusion=2"])
async def test_bytes_that_a_rank_holds_while_it_draws(two: DistributedRunner, way: str) -> None:
    held = await two.invoke({"way": "flux " + way}, timeout=100)
    found, _ = options.draw(FLUX, Machine(2, 1 << 34), 256, 256, short=4)
    [planned] = [option for option in found if option.plan == way]
    assert max(held["weights"]) == pytest.approx(planned.weights, rel=0.05), held
    assert max(held["cache"]) == pytest.approx(planned.cache, rel=0.01), held


@pytest.mark.linux
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["ulysses=2", "ring=2", "tensor=2"])
async def test_bytes_that_a_denoising_step_sends(two: DistributedRunner, way: str) -> None:
    result = await two.invoke({"way": "flux " + way}, timeout=100)
    found, _ = options.draw(FLUX, Machine(2, 1 << 34), 256, 256, short=4)
    [planned] = [option.wire for option in found if option.plan == way]
    assert sum(result["sent"]) / 2 == pytest.approx(planned, rel=0.1), result
