"""The process group: the ONLY user of ``torch.distributed``."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from drumline.nursery_protocol import RankConfig

log = logging.getLogger("drumline.rank.group")


class DeviceError(RuntimeError):
    """The ranks cannot have the device that was asked for."""


def choose_device(asked: str, backend: str, local_rank: int, world_size: int) -> torch.device:
    """Return this rank's device.

    Args:
        asked: ``cuda``, ``cpu`` or ``auto`` (cuda when there is one GPU per rank).
        backend: ``gloo`` lets ranks share GPUs, which NCCL does not.
        local_rank: the rank on this host.
        world_size: ranks on this host.

    Raises:
        DeviceError: ``cuda`` was asked for and there are too few GPUs.
    """
    if asked == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto" and count < world_size and not (count and backend == "gloo"):
        if count:
            log.warning("%d ranks but %d GPUs: running on the CPU; use -n %d to run on GPUs", world_size, count, count)
        return torch.device("cpu")
    if count == 0:
        raise DeviceError(
            "no CUDA device is visible; check the driver and CUDA_VISIBLE_DEVICES, or set DRUMLINE_DEVICE=cpu"
        )
    if count < world_size and backend != "gloo":
        raise DeviceError(
            f"{world_size} ranks need {world_size} GPUs, {count} are visible; use -n {count}, or backend=gloo to share GPUs"
        )
    return torch.device("cuda", local_rank % count)


def join(config: RankConfig) -> tuple[torch.device, str]:
    """Make this process a rank: environment, device, fresh random seeds, process group. Return device and backend."""
    os.environ.update(config.environment)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    device = choose_device(config.device, config.backend, config.rank, config.world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group, and in this thread: the current device is per thread
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.world_size))
    reseed()
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.FileStore(config.store, config.world_size),  # type: ignore[attr-defined]  # exported at run time only
        rank=config.rank,
        world_size=config.world_size,
        timeout=timedelta(seconds=config.collective_timeout),
    )
    return device, backend


def reseed() -> None:
    """Give this process its own random numbers: a forked rank inherits its siblings' generators."""
    torch.seed()
    random.seed()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))


def collectives() -> Callable[[], int]:
    """Return a function that tells how many collectives this rank has begun on the default group."""
    group: Any = dist.distributed_c10d._get_default_group()
    count: Callable[[], int] = group._get_sequence_number_for_group
    return count


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
