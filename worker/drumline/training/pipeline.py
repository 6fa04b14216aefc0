"""Pipeline parallel training: the layers split over ranks, the batch cut into microbatches that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining

from drumline.errors import ConfigurationError
from drumline.training.stage_plan import SCHEDULES, StagePlan

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Pipeline:
    """This rank's stages under a schedule of ``torch.distributed.pipelining``.

    Args:
        plan: who holds what.
        stages: this rank's stages, by their number. Each takes the tensor that the one before returns.
        loss: takes the last stage's output and the target of one microbatch, returns its mean loss.
        device: the worker's.

    Raises:
        ConfigurationError: ``stages`` are not those of the plan, or ranks share GPUs (backend gloo), which then
            cannot send each other anything.
    """

    def __init__(
        self, plan: StagePlan, stages: Mapping[int, torch.nn.Module], loss: Loss, device: torch.device
    ) -> None:
        wanted = plan.stages_of(dist.get_rank())
        if sorted(stages) != wanted:
            raise ConfigurationError(f"stages: rank {dist.get_rank()} holds {wanted}, not {sorted(stages)}")
        self.check(plan.ranks, device)
        self.plan = plan
        self._modules = dict(sorted(stages.items()))
        self._device = device
        self._first, self._last = 0 in stages, plan.stages - 1 in stages
        self._train = self._schedule(loss)
        self._infer: Any = None

    @staticmethod
    def check(ranks: int, device: torch.device) -> None:
        """Check that ranks can send each other anything. Call it before weights are loaded.

        Raises:
            ConfigurationError: they share GPUs.
        """
        if ranks > 1 and device.type == "cuda" and dist.get_backend() == "gloo":
            raise ConfigurationError(
                "backend: gloo sends nothing from GPU to GPU; use one GPU per rank with backend nccl"
            )

    def _schedule(self, loss: Loss | None) -> Any:
        name, per_rank = SCHEDULES[self.plan.schedule]
        stages = [
            pipelining.PipelineStage(module, number, self.plan.stages, self._device)
            for number, module in self._modules.items()
        ]
        kind = getattr(pipelining, name)
        return kind(stages[0] if per_rank == 1 else stages, n_microbatches=self.plan.microbatches, loss_fn=loss)

    def step(self, inputs: torch.Tensor, target: torch.Tensor) -> float:
        """Run forward and backward of one batch; gradients are those of the mean loss. A collective.

        Args:
            inputs: the first stage's, (batch, ...); the same on all ranks.
            target: (batch, ...); the same on all ranks.

        Returns:
            The mean loss, on every rank.

        Raises:
            InvalidPayload: the batch cannot be cut into equal microbatches.
        """
        self.plan.check_batch(len(inputs))
        losses: list[torch.Tensor] = []
        keywords = {"target": target, "losses": losses, "return_outputs": False} if self._last else {}
        self._train.step(*([inputs] if self._first else []), **keywords)
        mean = torch.stack(losses).mean().detach() if self._last else torch.zeros((), device=self._device)
        dist.broadcast(mean, src=self._rank_of_last)
        return float(mean.item())

    def infer(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Return the last stage's output for one batch on the rank that holds it, None elsewhere. A collective.

        Args:
            inputs: (batch, ...); the same on all ranks.
        """
        self.plan.check_batch(len(inputs))
        if self._infer is None:
            # Not the schedule of step(): with a loss, a forward pass without a target fails on the last rank, and the
            # others only see it leave.
            self._infer = self._schedule(None)
        with torch.no_grad():
            output: torch.Tensor | None = self._infer.eval(*([inputs] if self._first else []))
        return output if self._last else None

    @property
    def _rank_of_last(self) -> int:
        return (self.plan.stages - 1) % self.plan.ranks
