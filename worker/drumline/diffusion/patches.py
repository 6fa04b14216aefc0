"""Which rank holds which blocks and tokens in a patch pipeline. PURE."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


def stage_blocks(blocks: int, stages: int, stage: int) -> range:
    """Return the blocks of ``stage``, all stages being as even as can be, the first ones larger."""
    base, more = divmod(blocks, stages)
    start = stage * base + min(stage, more)
    return range(start, start + base + (stage < more))


@dataclass(frozen=True)
class Patch:
    """A part of the sequence that goes through the pipeline at once: positions, text first, then image.

    Attributes:
        text: for each rank of the sequence group, the text tokens that it holds of this patch.
        image: the same for image tokens, counted from 0.
    """

    text: tuple[range, ...]
    image: tuple[tuple[range, ...], ...]


def patches_of(image_tokens: int, text_tokens: int, patches: int, ranks: int) -> list[Patch]:
    """Split a sequence into patches, and each patch over the ranks of the sequence group.

    Args:
        image_tokens: a multiple of ``ranks``, at least ``patches * ranks``.
        text_tokens: a multiple of ``ranks``. All of them travel with the first patch.
        patches: how many.
        ranks: that split each patch.
    """
    units = image_tokens // ranks
    bounds = [units * i // patches * ranks for i in range(patches + 1)]
    nothing = tuple(range(0) for _ in range(ranks))
    return [
        Patch(
            text=tuple(_cut(0, text_tokens, ranks)) if i == 0 else nothing,
            image=tuple((part,) for part in _cut(start, stop, ranks)),
        )
        for i, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def merged(patches: Sequence[Patch]) -> Patch:
    """Return all patches as one, so that every rank keeps the tokens that it has in the single ones."""
    ranks = len(patches[0].text)
    return Patch(
        text=patches[0].text,
        image=tuple(tuple(part for patch in patches for part in patch.image[rank]) for rank in range(ranks)),
    )


def _cut(start: int, stop: int, parts: int) -> list[range]:
    size = (stop - start) // parts
    return [range(start + i * size, start + (i + 1) * size) for i in range(parts)]
