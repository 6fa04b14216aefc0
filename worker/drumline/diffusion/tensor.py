"""Tensor parallelism: every rank holds a slice of every large weight matrix."""

from __future__ import annotations

from typing import Any

import torch

from drumline.diffusion import compat
from drumline.diffusion.groups import Groups
from drumline.diffusion.plan import PlanError


def load_tensor_parallel(
    cls: Any, model: str, groups: Groups, *, dtype: torch.dtype, subfolder: str = "transformer"
) -> Any:
    """Load a transformer of which each rank reads and holds its slices only; whole when ``tensor`` is 1.

    Args:
        cls: its diffusers class.
        model: repository or folder of the pipeline, with safetensors weights.
        groups: of the plan.
        dtype: of the weights.
        subfolder: of the transformer.

    Returns:
        The model, on this rank's device.

    Raises:
        PlanError: this diffusers cannot split its weights.
    """
    if groups.plan.tensor == 1:
        return cls.from_pretrained(model, subfolder=subfolder, dtype=dtype).to(groups.device)
    config = _config(groups)
    with compat.on(groups.device):
        return cls.from_pretrained(model, subfolder=subfolder, dtype=dtype, parallel_config=config).to(groups.device)


def enable_tensor_parallel(model: Any, groups: Groups) -> None:
    """Split the weights of a model in memory over the ranks of ``tensor``. Without effect when that is 1.

    Every rank needs the whole model in memory first; :func:`load_tensor_parallel` does not.

    Args:
        model: a diffusers transformer on this rank's device. LoRA weights are to be fused or unloaded before.
        groups: of the plan.

    Raises:
        PlanError: diffusers cannot split its weights, it has LoRA layers, or it is parallel already.
    """
    from drumline.diffusion.describe import shape_of

    if groups.plan.tensor == 1:
        return
    name = type(model).__name__
    if getattr(model, "_parallel_config", None) is not None:
        raise PlanError(f"{name} is parallel already: enable it once, in setup()")
    if getattr(model, "peft_config", None):
        raise PlanError(f"{name} has LoRA layers, which would stay whole and be wrong: fuse or unload them first")
    groups.plan.check_tensor(shape_of(model))
    with compat.on(groups.device):
        model.enable_parallelism(config=_config(groups))


def _config(groups: Groups) -> Any:
    try:
        from diffusers import TensorParallelConfig
    except ImportError as error:
        raise PlanError(
            f"tensor={groups.plan.tensor}: this diffusers has no tensor parallelism; install diffusers>=0.42,<0.43"
        ) from error
    return TensorParallelConfig(mesh=groups.mesh("tensor"))
