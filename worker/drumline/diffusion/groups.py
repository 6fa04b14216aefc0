"""The process groups of a plan, and what ranks that draw one image have to agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from drumline.diffusion.plan import DIMENSIONS, ParallelPlan, PlanError

if TYPE_CHECKING:
    from drumline.worker import DistributedWorker


class Groups:
    """The process groups of one rank. Made by :func:`join`.

    Attributes:
        plan: the plan.
        rank: this rank.
        device: this rank's device.
        place: where this rank stands along each dimension of the plan.
    """

    def __init__(self, plan: ParallelPlan, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.rank = rank
        self.device = torch.device(device)
        self.place = plan.place(rank)
        if plan.pipefusion > 1 and self.device.type == "cuda" and dist.get_backend() == "gloo":
            raise PlanError(
                f"pipefusion={plan.pipefusion}: gloo sends nothing from GPU to GPU; "
                "use one GPU per rank with backend nccl, or pipefusion=1"
            )
        self._mesh: Any = None
        self._backward: dist.ProcessGroup | None = None
        if plan.world_size > 1:
            self._mesh = _make_mesh(plan, self.device)
        if plan.pipefusion > 1:
            self._backward = _one_of(plan, rank, "pipefusion")

    @property
    def leads(self) -> bool:
        """Whether this rank holds an image in the end, to be gathered: one rank for each of ``data``."""
        return all(at == 0 for name, at in self.place.items() if name != "data")

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        """Return the group along ``dimension``; None when this rank is alone there."""
        if getattr(self.plan, dimension) == 1:
            return None
        found: dist.ProcessGroup = self._mesh.get_group(dimension)
        return found

    @property
    def backward(self) -> dist.ProcessGroup | None:
        """A second group along ``pipefusion``, for what goes from the last stage to the first.

        With NCCL a communicator has one stream: sending and receiving both ways on one group can block for ever.
        """
        return self._backward

    def mesh(self, *dimensions: str) -> Any:
        """Return the ``DeviceMesh`` of ``dimensions``, for libraries that want one."""
        return self._mesh[dimensions] if len(dimensions) > 1 else self._mesh[dimensions[0]]

    def peer(self, dimension: str, at: int) -> int:
        """Return the rank that differs from this one along ``dimension``, where it stands ``at`` (modulo its size)."""
        return self.plan.rank({**self.place, dimension: at % getattr(self.plan, dimension)})

    def seed(self, seed: int | None) -> int:
        """Return the seed of this rank's image: the same on all ranks that draw it together, others for other ``data``.

        Args:
            seed: of the first image; None draws one at random on rank 0. A collective: call it on all ranks.
        """
        if seed is None:
            drawn = torch.randint(2**31, (1,), device=self.device)
            if self.plan.world_size > 1:
                dist.broadcast(drawn, src=0)
            seed = int(drawn)
        return seed + self.place["data"]

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator on this rank's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Collect one tensor from each of ``data`` on rank 0, in order; None on all other ranks.

        Args:
            tensor: same shape and type everywhere; looked at only where :attr:`leads` is true.
        """
        if not self.leads:
            return None
        group = self.group("data")
        if group is None:
            return [tensor]
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.plan.data)] if self.rank == 0 else None
        dist.gather(tensor, found, dst=0, group=group)
        return found


def join(plan: ParallelPlan, worker: DistributedWorker) -> Groups:
    """Make the process groups of ``plan``. A collective: call it in ``setup()``, on all ranks.

    Raises:
        PlanError: the plan is for another number of ranks.
    """
    if plan.world_size != worker.world_size:
        raise PlanError(f"the plan ({plan}) is for {plan.world_size} ranks and there are {worker.world_size}")
    return Groups(plan, worker.rank, worker.device)


def _make_mesh(plan: ParallelPlan, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    # diffusers wants to see ring and ulysses, even if one of them is 1.
    names = [n for n in DIMENSIONS if getattr(plan, n) > 1 or (plan.sequence > 1 and n in {"ring", "ulysses"})]
    return init_device_mesh(device.type, tuple(getattr(plan, n) for n in names), mesh_dim_names=tuple(names))


def _one_of(plan: ParallelPlan, rank: int, dimension: str) -> dist.ProcessGroup:
    """Make one group for each line along ``dimension``, on all ranks in the same order; return this rank's."""
    mine = None
    for first in range(plan.world_size):
        ranks = plan.peers(first, dimension)
        if ranks[0] == first:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine
