"""Pieces for workers that run one diffusion model on several ranks. Needs ``drumline[diffusion]``.

Everything is loaded on first use: torch and diffusers come with the pieces that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drumline.diffusion.describe import describe, shape_of
    from drumline.diffusion.groups import Groups, join
    from drumline.diffusion.guidance import enable_cfg_parallel
    from drumline.diffusion.pipefusion import FluxSampler
    from drumline.diffusion.plan import ModelShape, ParallelPlan, PlanError
    from drumline.diffusion.sequence import enable_context_parallel
    from drumline.diffusion.steps import AfterStep, Previews, picture
    from drumline.diffusion.tensor import enable_tensor_parallel, load_tensor_parallel

_HOMES = {
    "describe": ("describe", "shape_of"),
    "groups": ("Groups", "join"),
    "guidance": ("enable_cfg_parallel",),
    "pipefusion": ("FluxSampler",),
    "plan": ("ModelShape", "ParallelPlan", "PlanError"),
    "sequence": ("enable_context_parallel",),
    "steps": ("AfterStep", "Previews", "picture"),
    "tensor": ("enable_tensor_parallel", "load_tensor_parallel"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AfterStep",
    "FluxSampler",
    "Groups",
    "ModelShape",
    "ParallelPlan",
    "PlanError",
    "Previews",
    "describe",
    "enable_cfg_parallel",
    "enable_context_parallel",
    "enable_tensor_parallel",
    "join",
    "load_tensor_parallel",
    "picture",
    "shape_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drumline.diffusion' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"drumline.diffusion.{_HOME[name]}"), name)
    globals()[name] = value
    return value
