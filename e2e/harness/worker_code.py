"""The workers of the scenarios' apps. This file is put into ConfigMaps and git repositories; ranks import it in the pod."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drumline.distributed import DistributedWorker

#: A test makes it when a stream may come to its end.
RELEASE = Path("/tmp/release")
STEP_SECONDS = 0.05


class Steps(DistributedWorker):
    """Says its word at once, or streams step after step until it is released."""

    def __call__(self, streaming: bool = False, *, hold: bool = False, steps: int = 3) -> dict[str, Any]:
        """Take steps, each with a collective.

        Args:
            streaming: Send an update at each step.
            hold: Go on until `RELEASE` exists, however many steps that takes.
            steps: How many otherwise.
        """
        taken, going = 0, True
        while going:
            self.checkpoint()
            time.sleep(STEP_SECONDS if streaming else 0)  # the step's work
            taken += 1
            if streaming and self.rank == 0:
                self.add_streaming_result({"step": taken, "time": time.time()})
            more = torch.tensor(int(not RELEASE.exists() if hold else taken < steps))
            dist.broadcast(more, src=0)
            going = bool(more)
        ranks = torch.ones(())
        dist.all_reduce(ranks)
        return {"steps": taken, "ranks": int(ranks), "word": os.environ.get("WORD", ""), "pod": os.environ["HOSTNAME"]}


class BadSetup(DistributedWorker):
    """Fails on rank 1 while it is set up."""

    def setup(self) -> None:
        """Raise on one rank."""
        if self.rank == 1:
            raise RuntimeError("the weights are not there")


class Hungry(DistributedWorker):
    """Takes more memory than it may."""

    def setup(self) -> None:
        """Take memory until the kernel objects."""
        self.taken = [torch.ones(16, 1 << 20) for _ in range(1000)]
