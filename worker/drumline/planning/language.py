"""Language models of the llama family: parameters, activations, operations, from their configuration. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drumline.errors import ConfigurationError

#: ``model_type`` of configurations that the formulas below hold for: (biases of q, k and v; norms of q and k).
FAMILY = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


@dataclass(frozen=True)
class LanguageModel:
    """Sizes of a causal language model.

    Attributes:
        name: for people.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the gated feed-forward layer.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each head.
        vocabulary: tokens.
        tied: input and output embeddings are one matrix.
        biased: queries, keys and values have biases.
        normed: queries and keys are normalised per head.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    biased: bool = False
    normed: bool = False

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str = "") -> LanguageModel:
        """Read a transformers ``config.json``.

        Raises:
            ConfigurationError: the architecture is not of this family, or a size is missing.
        """
        kind = str(config.get("model_type"))
        if kind not in FAMILY:
            raise ConfigurationError(f"model_type: {kind!r} is not planned for; known are {', '.join(FAMILY)}")
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                name=name or kind,
                layers=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                intermediate=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                biased=FAMILY[kind][0],
                normed=FAMILY[kind][1],
            )
        except KeyError as error:
            raise ConfigurationError(f"config.json: {error.args[0]} is missing") from None

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads, which is that of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def split_per_layer(self) -> int:
        """Parameters of a layer that tensor parallelism splits."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        biases = self.queries + 2 * self.keys if self.biased else 0
        return attention + biases + 3 * self.hidden * self.intermediate

    @property
    def whole_per_layer(self) -> int:
        """Parameters of a layer that every rank of a tensor parallel group holds: the norms."""
        return 2 * self.hidden + (2 * self.head_dim if self.normed else 0)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.split_per_layer + self.whole_per_layer

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a tied matrix counts once."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    def saved_per_token(self, tensor: int = 1) -> float:
        """Numbers of one layer and token that a training step keeps for the backward pass, without recomputation.

        Each norm keeps its input, the normalised input and its output; attention its queries, keys, values, output and
        one number per head; the gated layer four widths.

        Args:
            tensor: ranks that share each layer.
        """
        heads = 2 * self.queries + 2 * self.keys + self.heads + 4 * self.intermediate
        if self.normed:  # input and normalised input, and one number per head, of queries and of keys
            heads += 2 * (self.queries + self.keys) + self.heads + self.kv_heads
        return 6 * self.hidden + 2 + heads / tensor

    def operations(self, tokens: int, context: int) -> float:
        """Multiplications and additions of a forward pass of ``tokens`` tokens that each see ``context`` on average."""
        dense = self.layers * self.split_per_layer + self.embedding
        return 2.0 * tokens * (dense + 2 * self.layers * self.queries * context)
