"""Which rank holds which layers under a pipeline schedule. PURE, and without torch."""

from __future__ import annotations

from dataclasses import dataclass

from drumline.errors import ConfigurationError, InvalidPayload

#: Name of a schedule: its class in ``torch.distributed.pipelining``, and the stages it wants on each rank.
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zero-bubble": ("ScheduleInterleavedZeroBubble", 2),
}


@dataclass(frozen=True)
class StagePlan:
    """A checked split of ``layers`` layers into stages.

    Attributes:
        layers: of the model.
        ranks: of the pipeline.
        schedule: a key of ``SCHEDULES``.
        microbatches: into which a batch is cut.

    Raises:
        ConfigurationError: it cannot work; the message says which number to change.
    """

    layers: int
    ranks: int
    schedule: str = "1f1b"
    microbatches: int = 8

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigurationError(f"schedule: {self.schedule!r} is none of {', '.join(SCHEDULES)}")
        if self.layers < self.stages:
            raise ConfigurationError(
                f"schedule: {self.schedule} on {self.ranks} ranks makes {self.stages} stages, the model has {self.layers} "
                f"layers; use at most {self.layers // self.stages_per_rank} ranks"
                + (", or 1f1b" if self.stages_per_rank > 1 else "")
            )
        if self.schedule != "gpipe" and self.microbatches < self.stages // self.stages_per_rank:
            raise ConfigurationError(
                f"microbatches: {self.schedule} on {self.ranks} ranks needs at least {self.ranks}, not {self.microbatches}"
            )
        if self.stages_per_rank > 1 and self.microbatches % self.ranks:
            raise ConfigurationError(
                f"microbatches: {self.schedule} on {self.ranks} ranks needs a multiple of {self.ranks}, "
                f"not {self.microbatches}"
            )
        if self.microbatches < 1:
            raise ConfigurationError(f"microbatches: at least 1, not {self.microbatches}")

    @property
    def stages_per_rank(self) -> int:
        """1, or 2 for the interleaved ones."""
        return SCHEDULES[self.schedule][1]

    @property
    def stages(self) -> int:
        """Number of stages over all ranks."""
        return self.ranks * self.stages_per_rank

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages of ``rank``, in order; stage ``i`` is on rank ``i % ranks``."""
        return list(range(rank, self.stages, self.ranks))

    def layers_of(self, stage: int) -> range:
        """Return the layers of ``stage``; sizes differ by at most one, the first stages are the larger ones."""
        size, larger = divmod(self.layers, self.stages)
        start = stage * size + min(stage, larger)
        return range(start, start + size + (stage < larger))

    def check_batch(self, batch: int) -> None:
        """Check that ``batch`` samples can be cut into equal microbatches.

        Raises:
            InvalidPayload: they cannot. A mean over unequal parts is not the batch's mean.
        """
        if batch % self.microbatches:
            raise InvalidPayload(
                f"batch: {batch} samples cannot be cut into {self.microbatches} equal microbatches; "
                f"use {-(-batch // self.microbatches) * self.microbatches}"
            )

    @property
    def bubble(self) -> float:
        """The share of time in which a rank waits, 0..1: (p - 1) / (v m + p - 1).

        An upper bound for ``zero-bubble``, which fills it with weight gradients.
        """
        waiting = self.ranks - 1
        return waiting / (self.stages_per_rank * self.microbatches + waiting)
