"""Tensor parallel training: every layer's heads and channels split over the ranks, as DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from drumline.errors import ConfigurationError

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_SUMMED = "replicated_with_grad_allreduce"


def check_heads(config: Any, ranks: int) -> None:
    """Check that a transformers configuration can be split over ``ranks``, before any weight is loaded.

    Args:
        config: a ``PretrainedConfig`` of a language model.
        ranks: of the tensor parallel group.

    Raises:
        ConfigurationError: heads, key-value heads or the feed-forward width cannot be divided, or the model has no
            plan of the styles that are known here. The message names the number.
    """
    unknown = sorted(set((config.base_model_tp_plan or {}).values()) - {*_STYLES, _SUMMED})
    if not config.base_model_tp_plan or unknown:
        raise ConfigurationError(
            f"model: the layers of {config.model_type} cannot be split here: "
            + (f"its plan has the styles {', '.join(unknown)}" if unknown else "transformers has no plan for it")
            + "; use a model such as llama or qwen3, or train it with lm_fsdp"
        )
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, field, None)
        if number is not None and number % ranks:
            fits = next(n for n in range(ranks - 1, 0, -1) if number % n == 0)
            raise ConfigurationError(
                f"model: {field} is {number}, which {ranks} ranks cannot divide; "
                f"use {fits} rank{'s' * (fits > 1)} or another model"
            )


def split_heads(
    model: torch.nn.Module, plan: Mapping[str, str], device: torch.device, *, mesh: DeviceMesh | None = None
) -> torch.nn.Module:
    """Split the layers that ``plan`` names over the ranks, in place, and return the model.

    The layers' code must take the number of heads from its tensors (``view(*shape, -1, head_dim)``), as transformers does.

    Args:
        model: the same on all ranks.
        plan: names of modules, ``*`` for any number, to ``colwise``, ``rowwise``, or
            ``replicated_with_grad_allreduce`` (whole on every rank, but applied to its own heads only, e.g. a norm of
            queries): the form of transformers' ``base_model_tp_plan``.
        device: the worker's.
        mesh: of one dimension; default: all ranks.

    Raises:
        ConfigurationError: an unknown style, or a name that fits no module.
    """
    mesh = mesh or init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tensor",))
    for pattern, style in plan.items():
        modules = [module for name, module in model.named_modules() if _fits(name, pattern)]
        if not modules:
            raise ConfigurationError(f"plan: no module is named {pattern}")
        for module in modules:
            if style == _SUMMED:
                for parameter in module.parameters():
                    parameter.register_hook(_sum_over(mesh))
            elif style in _STYLES:
                parallelize_module(module, mesh, _STYLES[style]())
            else:
                raise ConfigurationError(f"plan: {pattern}: {style} is none of {', '.join([*_STYLES, _SUMMED])}")
    return model


def _sum_over(mesh: DeviceMesh) -> Any:
    """Each rank's gradient comes from its own heads; the weight's is their sum."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=mesh.get_group())
        return total

    return hook


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))
