"""Which samples a step takes: a function of the seed and the step alone, so a resumed run goes on with the same ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

from drumline.errors import InvalidPayload

_T = TypeVar("_T")


def share(items: Sequence[_T], rank: int, world_size: int) -> Sequence[_T]:
    """Return every ``world_size``-th item from ``rank`` on: this rank's share of work that needs no other rank."""
    return items[rank::world_size]


def _mixed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes signed seeds


def seed_step(seed: int, step: int, *more: int) -> None:
    """Seed torch's default generators for one step, so that dropout and noise need no state in a checkpoint.

    Args:
        seed: of the run.
        step: of the run.
        *more: what else tells generators apart, e.g. the rank where ranks shall differ.
    """
    torch.manual_seed(_mixed(seed, step, *more))


class Batches:
    """The samples of each step, every epoch in a new order.

    Args:
        samples: how many there are.
        batch: samples per step, over all ranks.
        seed: of the order.

    Raises:
        InvalidPayload: there are no samples, or ``batch`` is below 1.
    """

    def __init__(self, samples: int, batch: int, seed: int = 0) -> None:
        if samples < 1:
            raise InvalidPayload("there are no samples to train on; give more data")
        if batch < 1:
            raise InvalidPayload(f"batch: {batch} samples per step; give at least 1")
        self.samples = samples
        self.batch = batch
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order

    def of_step(self, step: int) -> list[int]:
        """Return the sample numbers of the whole batch of ``step``; epochs follow each other without a gap."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._order(place // self.samples)[place % self.samples] for place in places]

    def mine(self, step: int, rank: int, world_size: int) -> list[int]:
        """Return this rank's part of ``of_step(step)``; the parts of all ranks are equally long.

        Raises:
            InvalidPayload: the batch cannot be divided by the ranks. A mean over unequal parts is not the batch's mean.
        """
        if self.batch % world_size:
            raise InvalidPayload(
                f"batch: {self.batch} samples cannot be divided by {world_size} ranks; "
                f"use {-(-self.batch // world_size) * world_size}"
            )
        return self.of_step(step)[rank::world_size]

    def generator(self, step: int, place: int) -> torch.Generator:
        """Return a generator for the noise of one sample of one step, the same whichever rank draws it.

        Args:
            step: of the run.
            place: of the sample in ``of_step(step)``.
        """
        return torch.Generator().manual_seed(_mixed(self.seed, step, place, 1))
