"""Every example on CUDA: one rank, and a group that gets the same: one GPU per rank with NCCL, else one for all with gloo.

gloo sums, gathers and exchanges what lies on a GPU, but it cannot send it from one rank to another, and transformers wants a
GPU for each rank: such examples have a group only where there are enough GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from drumline.distributed import DistributedRunner
from drumline.errors import SetupFailed
from drumline.toolkit import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 100.0  # seconds of one request, the compiling of kernels included


def near(bound: float) -> Callable[[Any, Any], None]:
    """Pictures whose pixels, in 0..1, differ by ``bound`` in the mean: 16-bit numbers, added in another order."""

    def check(group: Any, alone: Any) -> None:
        pictures = [np.asarray(each["image"], dtype=np.float32) / 255 for each in (alone, group)]
        assert pictures[0].std() > 0.02
        pictures[1] = pictures[1][: pictures[0].shape[0], : pictures[0].shape[1]]  # the first of a grid
        assert np.abs(pictures[0] - pictures[1]).mean() <= bound

    return check


def same_losses(bound: float) -> Callable[[Any, Any], None]:
    """Losses of a training that differ by ``bound`` at most."""

    def check(group: Any, alone: Any) -> None:
        assert len(alone["losses"]) == STEPS
        assert np.isfinite(alone["losses"]).all()
        assert np.abs(np.subtract(group["losses"], alone["losses"])).max() <= bound

    return check


def as_many_tokens(group: Any, alone: Any) -> None:
    """Texts of one length; with 16-bit numbers added in another order their words may part."""
    assert group["tokens"] == alone["tokens"] > 0
    assert group["finish"] == alone["finish"]


#: A pixel of the tiny Flux in bfloat16 is 0.005 from its value in float32, in the mean; SDXL's in float16 0.002.
SAME_PICTURE = near(0.02)


@dataclass(frozen=True)
class Case:
    """An example in a group, and what it is compared with.

    Attributes:
        request: to both.
        same: compares the group's result with that of one rank.
        setup: of the group.
        alone: setup of the one rank.
        like: the example of the one rank, where this one needs more.
        ranks: of the group.
        shares: whether the ranks may share a GPU.
    """

    request: dict[str, Any]
    same: Callable[[Any, Any], None] = SAME_PICTURE
    setup: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    ranks: int = 2
    shares: bool = True


STEPS = 4
PICTURE = {"prompt": "a cat", "width": 64, "height": 96, "num_inference_steps": STEPS, "seed": 7}
FLUX = {**PICTURE, "max_sequence_length": 32}
RUN = {"run": "gpu", "steps": STEPS, "batch": 4, "checkpoint_every": 2, "seed": 5}
LANGUAGE = {**RUN, "length": 16}
ONE_STAGE = {"cfg": 1, "pipefusion": 1, "ulysses": 1}

CASES = {
    "parallel_sdxl": Case(PICTURE),
    "sdxl_cfg": Case(PICTURE, like="parallel_sdxl"),
    "sd3_ulysses": Case({**PICTURE, "max_sequence_length": 51}),
    "flux_ulysses": Case(FLUX),
    "flux_ring": Case(FLUX),
    "flux_usp": Case(FLUX, ranks=4, alone={"ulysses": 1}),
    "flux_tensor": Case(FLUX),
    "flux_pipefusion": Case(FLUX, shares=False),
    "flux_hybrid": Case(FLUX, setup={**ONE_STAGE, "cfg": 2}, alone=ONE_STAGE),
    "llm_tensor": Case({"prompt": "17+25=", "max_tokens": 16}, as_many_tokens, shares=False),
    "flux_lora_ddp": Case({**RUN, "rank": 4, "size": 64}, same_losses(0.05)),
    "lm_fsdp": Case({**LANGUAGE, "sharding": "optimizer"}, same_losses(1e-3)),
    "lm_pipeline": Case(LANGUAGE, same_losses(1e-3), shares=False),
    "lm_tensor": Case(LANGUAGE, same_losses(1e-3)),
}


def pictures() -> dict[str, Any]:
    """What the LoRA learns from."""
    from PIL import Image as Pixels

    shades = [Pixels.new("RGB", (64, 64), (40 * n, 90, 200 - 30 * n)) for n in range(4)]
    return {"images": [Image.from_pil(each, "png").model_dump() for each in shades], "captions": ["a shade"] * 4}


async def run(example: str, ranks: int, backend: str, request: dict[str, Any], **setup: Any) -> Any:
    """Run an example with the tiny model: plain and streamed; the plain result."""
    name = yaml.safe_load((EXAMPLES / example / "app.yaml").read_text())["spec"]["workerClass"].partition(":")[2]
    app = f"{EXAMPLES / example / 'app.py'}:{name}"
    runner = DistributedRunner(app, world_size=ranks, device="cuda", backend=backend)
    try:
        await runner.start(timeout=200, model="tiny", **setup)
        assert all(rank.device.startswith("cuda") for rank in runner.status.ranks)
        plain = await runner.invoke(request, timeout=TIMEOUT)
        if "run" in request:
            request = {**request, "run": "streamed"}
        *updates, result = [event async for event in runner.stream(request, timeout=TIMEOUT)]
        assert updates
        assert result.keys() == plain.keys()
        assert any("image" in update for update in updates) == ("image" in plain)  # previews
    finally:
        await runner.stop()
    return plain


def test_every_example_is_here() -> None:
    assert {file.parent.name for file in EXAMPLES.glob("*/app.py")} == CASES.keys()


@pytest.mark.parametrize("example", CASES)
async def test_an_example(example: str, tmp_path: Path) -> None:
    case = CASES[example]
    request = {**case.request, **(pictures() if example == "flux_lora_ddp" else {})}

    def folder(name: str) -> dict[str, str]:
        return {"checkpoints": str(tmp_path / name)} if "run" in request else {}

    alone = await run(case.like or example, 1, "nccl", request, **case.alone, **folder("alone"))
    each_its_own = torch.cuda.device_count() >= case.ranks
    if each_its_own or case.shares:
        backend = "nccl" if each_its_own else "gloo"
        case.same(await run(example, case.ranks, backend, request, **case.setup, **folder("group")), alone)


@pytest.mark.parametrize("sharding", ["parameters", "gradients"])
async def test_fully_sharded_on_one_gpu_each(sharding: str, tmp_path: Path) -> None:
    """Whether gloo has the mean that FSDP2 asks for is not known for GPUs, so these are not shared."""
    ranks = min(2, torch.cuda.device_count())
    request = {**LANGUAGE, "sharding": sharding}
    alone = await run("lm_fsdp", 1, "nccl", request, checkpoints=str(tmp_path / "alone"))
    group = await run("lm_fsdp", ranks, "nccl", request, checkpoints=str(tmp_path / "group"))
    same_losses(1e-3)(group, alone)


@pytest.mark.parametrize("example", ["flux_pipefusion", "lm_pipeline"])
async def test_stages_that_share_a_gpu_are_refused(example: str) -> None:
    with pytest.raises(SetupFailed, match="gloo sends nothing from GPU to GPU"):
        await run(example, 2, "gloo", CASES[example].request)
