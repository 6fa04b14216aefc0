"""From a model's name and a workload to its plans. Reads at most one configuration file."""

from __future__ import annotations

from dataclasses import dataclass

from drumline.errors import ConfigurationError
from drumline.planning import known, options
from drumline.planning.language import LanguageModel
from drumline.planning.option import Machine, Option


@dataclass(frozen=True)
class Workload:
    """What one step does.

    Attributes:
        train: all weights, instead of inference.
        batch: texts, or samples per training step over all ranks.
        length: tokens of each.
        width: of an image, in pixels.
        height: of an image, in pixels.
    """

    train: bool = False
    batch: int = 8
    length: int = 4096
    width: int = 1024
    height: int = 1024


def plans_for(model: str, machine: Machine, workload: Workload) -> tuple[list[Option], list[str]]:
    """Return every plan, and why others are refused.

    Args:
        model: see :func:`drumline.planning.known.find`.
        machine: its GPUs.
        workload: of each step.

    Raises:
        ConfigurationError: the model is not known, or cannot do this work.
    """
    facts = known.find(model)
    if isinstance(facts, LanguageModel):
        plan = options.train if workload.train else options.generate
        return plan(facts, machine, workload.batch, workload.length)
    if workload.train:
        raise ConfigurationError(
            "--train: planned for language models only; a LoRA of a diffusion model trains with DDP"
        )
    return options.draw(facts, machine, workload.width, workload.height)
