"""Attention processors that exchange a part of the sequence for a part of the heads (Ulysses), and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from drumline.diffusion.plan import PlanError

if TYPE_CHECKING:
    import torch.distributed as dist

    Rotary = tuple[torch.Tensor, torch.Tensor]


class Ulysses:
    """All-to-all over the ranks of a group: what every processor here shares.

    Args:
        group: the ranks that split the sequence; None for one.
    """

    # What diffusers looks for in processors that obey it. Ours need no help, and must not get it twice.
    _attention_backend = None

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ranks = group.size() if group is not None else 1

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange: some tokens of all heads (B, S, H, D) for all tokens of some heads (B, n*S, H/n, D), rank by rank."""
        if self.ranks == 1:
            return x
        batch, tokens, heads, width = x.shape
        x = x.reshape(batch, tokens, self.ranks, heads // self.ranks, width).permute(2, 1, 0, 3, 4)
        return self._exchange(x).flatten(0, 1).transpose(0, 1)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_heads`."""
        if self.ranks == 1:
            return x
        batch, tokens, heads, width = x.shape
        x = x.reshape(batch, self.ranks, tokens // self.ranks, heads, width).permute(1, 3, 0, 2, 4)
        return self._exchange(x).flatten(0, 1).permute(1, 2, 0, 3)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the attention of this rank's tokens (B, S, H, D) to all ranks' tokens, heads joined: (B, S, H*D)."""
        query, key, value = self.to_heads(query), self.to_heads(key), self.to_heads(value)
        key, value = self.remember(key, value)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.to_tokens(out).flatten(2, 3).to(query.dtype)

    def remember(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values to attend to, given the fresh ones."""
        return key, value

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return out


class FluxUlysses(Ulysses):
    """For the blocks of ``FluxTransformer2DModel``, double and single."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Attend; shapes as in diffusers' ``FluxAttnProcessor``, over this rank's tokens."""
        from diffusers.models.embeddings import apply_rotary_emb

        refuse(attn, attention_mask)
        query, key, value = _project(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = _project(attn, encoder_hidden_states, _ADDED, _ADDED_NORMS)
            query, key, value = (torch.cat(pair, 1) for pair in zip(added, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self.attend(query, key, value)
        if encoder_hidden_states is None:
            return out
        image = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image, attn.to_add_out(out[:, :text].contiguous())


class JointUlysses(Ulysses):
    """For the blocks of ``SD3Transformer2DModel``, whose own processor knows nothing of a split sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """Attend; shapes as in diffusers' ``JointAttnProcessor2_0``, over this rank's tokens."""
        refuse(attn, attention_mask)
        query, key, value = _project(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        image = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            added = _project(attn, encoder_hidden_states, _ADDED, _ADDED_NORMS)
            query, key, value = (torch.cat(pair, 1) for pair in zip((query, key, value), added, strict=True))
        out = self.attend(query, key, value)
        drawn = attn.to_out[1](attn.to_out[0](out[:, :image].contiguous()))
        if encoder_hidden_states is None:
            return drawn
        text = out[:, image:].contiguous()
        return drawn, text if attn.context_pre_only else attn.to_add_out(text)


def refuse(attn: Any, mask: torch.Tensor | None) -> None:
    """Raise for what these processors would compute wrongly.

    Raises:
        PlanError: fused projections, or an attention mask.
    """
    if getattr(attn, "fused_projections", False):
        raise PlanError("fused attention projections cannot be split here: call unfuse_qkv_projections() first")
    if mask is not None:
        raise PlanError("an attention mask cannot be split here: leave it out")


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_ADDED_NORMS = ("norm_added_q", "norm_added_k")


def _project(attn: Any, x: torch.Tensor, layers: tuple[str, ...], norms: tuple[str, ...]) -> list[torch.Tensor]:
    """Return query, key and value (B, S, H, D) of ``x`` (B, S, C)."""
    projected = [getattr(attn, layer)(x).unflatten(-1, (attn.heads, -1)) for layer in layers]
    for i, norm in enumerate(norms):
        normalise = getattr(attn, norm, None)
        if normalise is not None:
            projected[i] = normalise(projected[i])
    return projected
