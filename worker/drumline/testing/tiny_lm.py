"""A tiny language model built offline, and a task that it can learn in seconds: what tests and examples run.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from drumline.testing.tiny import built_once, seeded, without_progress_bars

#: Raise it when a builder below changes.
RECIPE = 1

_SPECIALS = ("<pad>", "<end>")
_SIZES: dict[str, Any] = {
    "vocab_size": 256 + len(_SPECIALS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}


def build_llama(seed: int = 0, **changes: Any) -> Any:
    """Return a tiny ``LlamaForCausalLM`` in float32 on the CPU (8 layers, 4 heads, 0.4 M parameters).

    Args:
        seed: of the weights; the caller's random state is left as it was.
        **changes: fields of its ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(seed):
        return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes})).eval()


def build_qwen3(seed: int = 0, **changes: Any) -> Any:
    """Return a ``Qwen3ForCausalLM`` of the same size, which also normalises queries and keys; as :func:`build_llama`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with seeded(seed):
        return Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, "head_dim": 16, **changes})).eval()


def build_tokenizer() -> Any:
    """Return a tokenizer with one id per byte, and two specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIALS[0], eos_token=_SPECIALS[1])


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write model and tokenizer to ``folder`` for ``from_pretrained``; return it. ``changes`` as in :func:`build_llama`.

    Raises:
        RuntimeError: this process is a rank other than 0, where transformers leaves out the weights.
    """
    with without_progress_bars():
        build_llama(seed, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if not any(folder.glob("*.safetensors")):
        raise RuntimeError("transformers saves models on rank 0 only; build the tiny model there, then pass a barrier")
    return folder


def tiny_llama(cache: Path | None = None) -> Path:
    """Return the folder of the tiny model (2 MB), built at the first call and found again by later ones.

    Args:
        cache: parent folder; default as for ``tiny_models``.
    """
    return built_once({"llama": save_llama}, RECIPE, cache) / "llama"


def sums(lines: int = 2000, seed: int = 0) -> str:
    """Return a text to learn: ``17+25=42`` and so on, one sum per line, the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311  # not for secrets
    pairs = ((chance.randrange(50), chance.randrange(50)) for _ in range(lines))
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)
