"""The worker under chaos: steps with collectives, updates that carry the caller's secret, and acts of bad faith."""

from __future__ import annotations

import time
from typing import Any

from drumline.distributed import DistributedWorker
from drumline.testing.poison import DEEDS, RAISES, RESULTS


class Chaos(DistributedWorker):
    """Works in lockstep with its peers; what it says is a function of its payload alone."""

    def __call__(
        self,
        streaming: bool = False,
        *,
        secret: str = "",
        steps: int = 1,
        pace: float = 0.0,
        pad: int = 0,
        act: str = "",
        rank: int = -1,
    ) -> dict[str, Any]:
        """Do ``steps`` steps.

        Args:
            streaming: send an update per step from rank 0.
            secret: is printed, and comes back in every update and in the result; no other request may ever see it.
            steps: how many.
            pace: seconds that a step takes.
            pad: further characters per update, for readers that are slow.
            act: a key of the tables of ``drumline.testing.poison``, done on ``rank`` before the steps.
            rank: where; -1: nowhere.
        """
        import torch
        import torch.distributed as dist

        self.rank_print(f"{secret} begins")
        if act and rank == self.rank:
            if act in RAISES:
                raise RAISES[act]()
            if act in DEEDS:
                DEEDS[act]()
            else:
                return {"secret": secret, "poison": RESULTS[act]()}
        for i in range(steps):
            self.checkpoint()
            time.sleep(pace)  # the pace is the workload
            if self.world_size > 1 and not act:
                ones = torch.ones(1)
                dist.all_reduce(ones)
                if int(ones) != self.world_size:
                    raise RuntimeError(f"a collective of {self.world_size} ranks came to {int(ones)}")
            if streaming and self.rank == 0:
                self.add_streaming_result({"secret": secret, "step": i, "pad": "x" * pad})
        return {"secret": secret, "steps": steps}
