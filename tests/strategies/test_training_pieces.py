"""Pieces of drumline.training that need torch but no second rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drumline.errors import ConfigurationError, InvalidPayload
from drumline.testing.tiny_lm import build_tokenizer, sums
from drumline.training import Batches, check_heads, seed_step, share, token_blocks


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (3, 8), (16, 16), (1, 2)])
def test_every_epoch_takes_every_sample_once_in_a_new_order(samples: int, batch: int) -> None:
    batches = Batches(samples, batch, seed=3)
    steps = 6 * samples // batch + 1
    order = [each for step in range(steps) for each in batches.of_step(step)]
    epochs = [order[i : i + samples] for i in range(0, len(order) - samples + 1, samples)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert samples == 1 or len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_share_a_batch_whatever_their_number_and_a_new_start_gives_the_same(ranks: int) -> None:
    first, again = Batches(20, 8, seed=1), Batches(20, 8, seed=1)
    for step in (0, 7, 3):
        parts = [first.mine(step, rank, ranks) for rank in range(ranks)]
        assert {len(part) for part in parts} == {8 // ranks}
        assert sorted(each for part in parts for each in part) == sorted(again.of_step(step))
    assert Batches(20, 8, seed=2).of_step(0) != first.of_step(0)


def test_unequal_shares_and_no_samples_are_refused() -> None:
    with pytest.raises(InvalidPayload, match="batch: 6 samples cannot be divided by 4 ranks; use 8"):
        Batches(20, 6).mine(0, 0, 4)
    with pytest.raises(InvalidPayload, match="no samples"):
        Batches(0, 4)
    with pytest.raises(InvalidPayload, match="batch: 0"):
        Batches(4, 0)


def test_noise_belongs_to_the_sample_not_to_the_rank() -> None:
    batches = Batches(20, 8, seed=1)
    drawn = {
        (step, place): torch.rand(1, generator=batches.generator(step, place)).item()
        for step in range(4)
        for place in range(8)
    }
    assert len(set(drawn.values())) == 32
    assert torch.rand(1, generator=Batches(9, 8, seed=1).generator(2, 5)).item() == drawn[2, 5]


def test_a_step_has_its_own_random_numbers() -> None:
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for args in ((1, 0), (1, 1), (2, 0), (1, 0, 0), (1, 0, 1), (1, 0)):
            seed_step(*args)
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) == 5


def test_shares_cover_everything() -> None:
    parts = [share("abcdefg", rank, 3) for rank in range(3)]
    assert parts == ["adg", "be", "cf"]


def test_blocks_overlap_by_one_token_and_hold_the_text() -> None:
    blocks = token_blocks("0123456789", build_tokenizer(), 3)
    assert blocks.shape == (3, 4)
    assert build_tokenizer().batch_decode(blocks.tolist()) == ["0123", "3456", "6789"]
    with pytest.raises(InvalidPayload, match="text: 3 tokens are less than one block of 3"):
        token_blocks("012", build_tokenizer(), 3)


def test_the_tiny_task_is_true_and_always_the_same() -> None:
    lines = sums(50, seed=4).splitlines()
    assert len(lines) == 50
    for line in lines:
        left, right = line.split("=")
        assert sum(map(int, left.split("+"))) == int(right)
    assert sums(50, seed=4) == "\n".join(lines) + "\n" != sums(50, seed=5)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "num_attention_heads is 4, which 3 ranks cannot divide; use 2 ranks"),
        ({"num_key_value_heads": 2}, 4, "num_key_value_heads is 2, which 4 ranks cannot divide; use 2 ranks"),
        ({"intermediate_size": 129}, 2, "intermediate_size is 129, which 2 ranks cannot divide; use 1 rank or"),
    ],
)
def test_heads_that_cannot_be_divided_are_named(changes: dict[str, Any], ranks: int, message: str) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, **changes}
    with pytest.raises(ConfigurationError, match=message):
        check_heads(LlamaConfig(**sizes), ranks)
    check_heads(LlamaConfig(**sizes), 1)


def test_models_without_a_plan_and_with_styles_of_their_own_are_refused() -> None:
    from transformers import GPT2Config, MixtralConfig

    with pytest.raises(
        ConfigurationError, match=r"layers of gpt2 cannot be split here: transformers has no plan for it"
    ):
        check_heads(GPT2Config(), 2)
    with pytest.raises(
        ConfigurationError, match=r"layers of mixtral cannot be split here: its plan has the styles moe_tp_experts"
    ):
        check_heads(MixtralConfig(), 2)
