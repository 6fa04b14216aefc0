"""What `drumline plan` says of the wire, against what the kernel counts as written by two ranks (float32, gloo)."""

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


@pytest.mark.linux
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("way", ["ulysses=2", "ring=2", "tensor=2"])
async def test_bytes_that_a_denoising_step_sends(two: DistributedRunner, way: str) -> None:
    result = await two.invoke({"way": "flux " + way}, timeout=100)
    tiny = Denoiser("tiny", "flux", 4, 16, 2, 4, 64, 32, 32, 16, batched=False, companions=0, distilled=True)
    found, _ = options.draw(tiny, Machine(2, 1 << 34), 256, 256, short=4)
    [planned] = [option.wire for option in found if option.plan == way]
    assert sum(result["sent"]) / 2 == pytest.approx(planned, rel=0.1), result
