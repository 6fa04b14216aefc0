"""The app of `helm test`: each rank adds its part, so the sum is right only when all of them took part."""

import torch

from drumline.distributed import DistributedWorker


class Sum(DistributedWorker):
    """Adds the numbers of all ranks."""

    def __call__(self, streaming: bool = False, value: int = 0) -> dict[str, int]:
        """Return the sum over all ranks of `value` plus the rank's number."""
        total = torch.tensor([value + self.rank])
        torch.distributed.all_reduce(total)
        return {"sum": int(total[0]), "ranks": self.world_size}
