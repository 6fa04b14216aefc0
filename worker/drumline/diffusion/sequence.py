"""Context parallelism: the tokens of one image over several ranks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist

from drumline.diffusion import compat
from drumline.diffusion.attention import Ulysses
from drumline.diffusion.describe import shape_of
from drumline.diffusion.groups import Groups
from drumline.diffusion.own_plans import OWN_PLANS
from drumline.diffusion.plan import PlanError
from drumline.errors import InvalidPayload


def enable_context_parallel(model: Any, groups: Groups, *, own: bool | None = None) -> None:
    """Split the tokens of every image over the ranks of ``ulysses`` and ``ring``. Without effect when both are 1.

    Args:
        model: a diffusers transformer; the plan was checked against it.
        groups: of the plan.
        own: True for our own processors, False for diffusers' ``enable_parallelism``, None for diffusers' where it
            has a plan for this model.

    Raises:
        PlanError: the model's sequence cannot be split, or is split already.
    """
    plan = groups.plan
    if plan.sequence == 1:
        return
    shape = shape_of(model)
    if getattr(model, "_parallel_config", None) is not None or isinstance(_first_processor(model), Ulysses):
        raise PlanError(f"{shape.name} is parallel already: enable it once, in setup()")
    plan.check_sequence(shape)
    if own or (own is None and shape.sequence == "drumline"):
        _split_ourselves(model, groups)
        return
    if shape.sequence != "diffusers":
        raise PlanError(
            f"diffusers cannot split the sequence of {shape.name}: its attention processors "
            f"({', '.join(shape.bypassing) or 'all'}) know nothing of a split sequence; leave out own=False"
        )
    from diffusers import ContextParallelConfig

    if plan.ring > 1:
        compat.choose_ring_backend(model, groups.device)
    config = ContextParallelConfig(
        ring_degree=plan.ring, ulysses_degree=plan.ulysses, mesh=groups.mesh("ring", "ulysses")
    )
    with compat.on(groups.device):
        model.enable_parallelism(config=config)
    _check_tokens_first(model, model._cp_plan, plan.sequence)


def _first_processor(model: Any) -> Any:
    return next(iter(getattr(model, "attn_processors", {}).values()), None)


def _check_tokens_first(model: Any, plan: dict[str, Any], ranks: int) -> None:
    """Have uneven tokens refused with their number; diffusers would raise a bare AssertionError."""
    split = {name: cut.split_dim for name, cut in plan.get("", {}).items() if isinstance(name, str)}

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(_parameters(model), args, strict=False)), **kwargs}
        for name, dimension in split.items():
            value = given.get(name)
            if isinstance(value, torch.Tensor) and value.shape[dimension] % ranks:
                raise InvalidPayload(
                    f"{name}: {value.shape[dimension]} tokens cannot be shared evenly by {ranks} ranks"
                )

    model.register_forward_pre_hook(check, with_kwargs=True)


def _split_ourselves(model: Any, groups: Groups) -> None:
    plan = OWN_PLANS[type(model).__name__]
    group = groups.group("ulysses")
    if group is None or groups.plan.ring > 1:
        raise PlanError(f"ring={groups.plan.ring}: our own processors know ulysses= only")
    model.set_attn_processor(plan.processor(group))
    cut = functools.partial(_cut, group=group)

    def split_inputs(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(_parameters(model), args, strict=False)), **kwargs}
        for name, dimension in plan.inputs.items():
            if given.get(name) is not None:
                given[name] = cut(name, given[name], dimension)
        return (), given

    if plan.inputs:
        model.register_forward_pre_hook(split_inputs, with_kwargs=True)
    for name, dimension in plan.outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name, dimension=dimension: cut(name, out, dimension)
        )
    model.get_submodule(plan.gather).register_forward_hook(lambda _, __, out: _join(out, group))


def _parameters(model: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def _cut(name: str, x: torch.Tensor, dimension: int, group: dist.ProcessGroup) -> torch.Tensor:
    if x.shape[dimension] % group.size():
        raise InvalidPayload(f"{name}: {x.shape[dimension]} tokens cannot be shared evenly by {group.size()} ranks")
    return x.chunk(group.size(), dimension)[group.rank()].contiguous()


def _join(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)
