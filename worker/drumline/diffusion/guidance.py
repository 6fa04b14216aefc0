"""CFG parallelism: each of two ranks runs one branch of classifier-free guidance."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from drumline.diffusion.groups import Groups
from drumline.diffusion.plan import PlanError


def enable_cfg_parallel(model: Any, groups: Groups) -> None:
    """Have each rank of a pair run its half of the batch of every forward. Without effect when ``cfg`` is 1.

    Pipelines that put both branches into one batch (SDXL, SD3) are left as they are: they see the whole output. A batch
    that cannot be halved, as with guidance off, is run whole by both ranks.

    Args:
        model: the denoiser.
        groups: of the plan. Both ranks of a pair must draw the same image: give them the same seed
            (:meth:`Groups.seed`).

    Raises:
        PlanError: the model's pipelines run the branches one after the other, or it is parallel already.
    """
    from drumline.diffusion.describe import shape_of

    group = groups.group("cfg")
    if group is None:
        return
    shape = shape_of(model)
    if shape.guidance != "batched":
        hint = "; use FluxSampler, which splits them" if shape.pipefusion else ""
        raise PlanError(f"cfg=2: {shape.name} is not known to run both branches of guidance in one forward{hint}")
    if getattr(model, "cfg_group", None) is not None:
        raise PlanError(f"{shape.name} is parallel already: enable it once, in setup()")
    model.cfg_group = group
    forward = model.forward

    @functools.wraps(forward)
    def halved(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        sample: torch.Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        batch = sample.shape[0]
        if batch % 2:
            return forward(*args, return_dict=return_dict, **kwargs)
        half = functools.partial(_half, batch=batch, at=group.rank())
        mine = forward(*half(args), return_dict=False, **half(kwargs))[0].contiguous()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=group)
        whole = torch.cat(both)
        return _output(model, whole) if return_dict else (whole,)

    model.forward = halved


def _half(value: Any, batch: int, at: int) -> Any:
    """Halve every tensor in ``value`` that has one row per member of the batch."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[at] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _half(each, batch, at) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(each, batch, at) for each in value)
    return value


def _output(model: Any, sample: torch.Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput

    return (UNet2DConditionOutput if isinstance(model, UNet2DConditionModel) else Transformer2DModelOutput)(
        sample=sample
    )
