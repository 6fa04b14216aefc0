"""Small pieces for training workers: data order, progress, checkpoints, and the ways to spread a model over ranks.

Each piece works without the others. Nothing heavy is imported before a name is used::

    from drumline.training import Batches, Checkpoints, Meter, shard
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drumline.training.artefacts import exported, safetensors_file
    from drumline.training.batches import Batches, seed_step, share
    from drumline.training.checkpoints import Checkpoints
    from drumline.training.fully_sharded import shard
    from drumline.training.meter import Meter, Pace, set_learning_rate, warmup_cosine
    from drumline.training.pipeline import Pipeline
    from drumline.training.replicas import mean_over_ranks, replicate, zero1
    from drumline.training.stage_plan import SCHEDULES, StagePlan
    from drumline.training.tensor import check_heads, split_heads
    from drumline.training.text import token_blocks

_HOMES = {
    "artefacts": ("exported", "safetensors_file"),
    "batches": ("Batches", "seed_step", "share"),
    "checkpoints": ("Checkpoints",),
    "fully_sharded": ("shard",),
    "meter": ("Meter", "Pace", "set_learning_rate", "warmup_cosine"),
    "pipeline": ("Pipeline",),
    "replicas": ("mean_over_ranks", "replicate", "zero1"),
    "stage_plan": ("SCHEDULES", "StagePlan"),
    "tensor": ("check_heads", "split_heads"),
    "text": ("token_blocks",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SCHEDULES",
    "Batches",
    "Checkpoints",
    "Meter",
    "Pace",
    "Pipeline",
    "StagePlan",
    "check_heads",
    "exported",
    "mean_over_ranks",
    "replicate",
    "safetensors_file",
    "seed_step",
    "set_learning_rate",
    "shard",
    "share",
    "split_heads",
    "token_blocks",
    "warmup_cosine",
    "zero1",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drumline.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"drumline.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
