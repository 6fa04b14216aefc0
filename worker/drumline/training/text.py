"""Text for language models: one long row of tokens, cut into blocks."""

from __future__ import annotations

from typing import Any

import torch

from drumline.errors import InvalidPayload


def token_blocks(text: str, tokenizer: Any, length: int) -> torch.Tensor:
    """Return the tokens of ``text`` as (N, length + 1) integers; position ``t + 1`` is the target of position ``t``.

    Args:
        text: to learn.
        tokenizer: a transformers tokenizer.
        length: tokens that the model sees at once. What is left at the end is dropped.

    Raises:
        InvalidPayload: the text is shorter than one block.
    """
    # Without the tokenizer's warning that this is longer than one input of the model: it is cut below.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = (len(ids) - 1) // length
    if count < 1:
        raise InvalidPayload(f"text: {len(ids)} tokens are less than one block of {length} + 1; give more text")
    return ids[: count * length + 1].unfold(0, length + 1, length)
