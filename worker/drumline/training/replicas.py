"""A whole model on every rank: DDP, and ZeRO-1, which splits only the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def replicate(model: torch.nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """Return ``model`` in ``DistributedDataParallel``: gradients become their mean over the ranks.

    Args:
        model: on ``device``. Its parameters become those of rank 0.
        device: the worker's.
        **options: of ``DistributedDataParallel``.
    """
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)


def zero1(
    parameters: Iterable[torch.nn.Parameter], optimizer: type[torch.optim.Optimizer], **options: Any
) -> ZeroRedundancyOptimizer:
    """Return ``optimizer`` with its state split over the ranks (ZeRO-1); for a model in DDP.

    Args:
        parameters: to train, in the same order on all ranks. Each rank updates about 1/N of them and sends them to the others.
        optimizer: e.g. ``torch.optim.AdamW``.
        **options: its arguments.
    """
    return ZeroRedundancyOptimizer([p for p in parameters if p.requires_grad], optimizer, **options)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Return the mean of a scalar over the ranks. A collective: call it on all ranks.

    ``ReduceOp.AVG`` is NCCL's only, so this is a sum and a division.
    """
    total = value.detach().clone().float()
    dist.all_reduce(total)
    return float(total.item()) / dist.get_world_size()
