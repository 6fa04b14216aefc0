"""FSDP2: parameters, gradients and optimizer state split over the ranks (ZeRO-3), or all but the gathered parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

_Model = TypeVar("_Model", bound=torch.nn.Module)


def shard(
    model: _Model,
    blocks: Iterable[torch.nn.Module],
    device: torch.device,
    *,
    keep_gathered: bool = False,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> _Model:
    """Apply ``fully_shard`` to every block and to the rest, in place, and return the model.

    Make the optimizer afterwards: it must see the split parameters.

    Args:
        model: the same on all ranks.
        blocks: parts that are gathered one at a time, e.g. a transformer's layers: at any time the whole parameters of
            about one of them exist.
        device: the worker's.
        keep_gathered: keep parameters from forward until backward. More memory (all parameters, as in ZeRO-2), fewer
            bytes on the wire: one gathering less per step.
        mesh: of one dimension; default: all ranks.
        **options: of ``fully_shard``, e.g. ``mp_policy``.
    """
    mesh = mesh or init_device_mesh(device.type, (dist.get_world_size(),))
    parts: list[torch.nn.Module] = [*blocks, model]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=not keep_gathered, **options)
    return model
