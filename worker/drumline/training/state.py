"""What a checkpoint holds: parameters and optimizer state by parameter name, whichever ranks hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

MODEL, OPTIMIZER = "model", "optimizer"
#: Only what is trained: a LoRA's checkpoint is as small as the LoRA.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)

#: A model and its optimizer; a rank with several pipeline stages has several.
Part = tuple[torch.nn.Module, torch.optim.Optimizer]


def collect(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """Return the state of all parts, as tensors that a load may write to.

    Optimizers that have not stepped yet get the state that a step would make, without a change to parameters.
    """
    held: dict[str, dict[str, Any]] = {MODEL: {}, OPTIMIZER: {}}
    for model, optimizer in parts:
        held[MODEL].update(get_model_state_dict(model, options=_OPTIONS))
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            held[OPTIMIZER].update(_zero_state(model, optimizer))
        else:
            held[OPTIMIZER].update(get_optimizer_state_dict(model, optimizer, options=_OPTIONS))
    return held


def restore(parts: Sequence[Part], held: dict[str, dict[str, Any]]) -> None:
    """Put what :func:`collect` returned, and a load has filled, into the parts."""
    for model, optimizer in parts:
        set_model_state_dict(model, held[MODEL], options=_OPTIONS)
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            continue  # the tensors in `held` are the optimizer's own
        set_optimizer_state_dict(model, optimizer, held[OPTIMIZER], options=_OPTIONS)


def _plain(name: str) -> str:
    """Return a parameter's name without what wrappers put before it."""
    return name.removeprefix("module.")


def _zero_state(model: torch.nn.Module, optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    """Return the state that this rank holds, by parameter name: every parameter's is on exactly one rank."""
    local = optimizer.optim
    mine = {parameter for group in local.param_groups for parameter in group["params"]}
    if not local.state:
        _step_nowhere(local)
    return {
        f"state.{_plain(name)}.{what}": value
        for name, parameter in model.named_parameters()
        if parameter in mine
        for what, value in local.state[parameter].items()
    }


def _step_nowhere(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's state by a step with zero gradients and rate; then set counters back."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None
