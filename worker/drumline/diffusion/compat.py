"""What diffusers' parallelism lacks on CPU ranks, lent to it. It is experimental (docs/adr/0012): all that we patch is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def diffusers_splits_sequences() -> bool:
    """Whether this diffusers has the context parallelism that we know."""
    try:
        from diffusers import ContextParallelConfig
        from diffusers.models.modeling_utils import ModelMixin
    except ImportError:
        return False
    return hasattr(ModelMixin, "enable_parallelism") and "mesh" in ContextParallelConfig.__dataclass_fields__


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Let diffusers set up parallelism on CPU ranks: it asks for the number of accelerators and knows no type ``cpu``."""
    if device.type != "cpu":
        yield
        return
    from diffusers.hooks import tensor_parallel

    types = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
    with (
        patch.object(torch.accelerator, "device_count", lambda: 1),
        patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", types),
    ):
        yield


def choose_ring_backend(model: Any, device: torch.device) -> None:
    """Give ``model`` an attention that also returns the softmax's normaliser, which parts of a ring are joined with.

    The default one returns none. On GPUs torch's flash attention does (float16 and bfloat16 only); on CPUs we lend
    diffusers' default a forward from torch's CPU flash attention.
    """
    if device.type == "cpu":
        import diffusers.models.attention_dispatch as dispatch

        dispatch._native_attention_forward_op = _cpu_forward(dispatch._native_attention_forward_op)
    else:
        model.set_attention_backend("_native_flash")


def _cpu_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(original, "returns_lse", False):
        return original

    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        **more: Any,
    ) -> Any:
        if not return_lse:
            return original(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False, **more)
        heads_first = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        out, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return out.transpose(1, 2).contiguous(), normaliser.transpose(1, 2).contiguous()

    forward.returns_lse = True  # type: ignore[attr-defined]
    return forward
