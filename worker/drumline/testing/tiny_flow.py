"""Tiny Flux and Stable Diffusion 3 pipelines built offline, like the SDXL of :mod:`drumline.testing.tiny`.

Four heads of 16 or 8, so that they split over two and over four ranks; a few MB; pictures are soft fields of colours that
depend on noise and prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from drumline.testing.tiny import (
    autoencoder,
    built_once,
    clip_text,
    clip_tokenizer,
    save_pipeline,
    save_taesd,
    seeded,
)

if TYPE_CHECKING:
    import torch

#: Raise it when a builder below changes.
RECIPE = 2

_T5_LENGTH = 64
_SHIFT = 0.1  # of the latents, in both decoders' pipelines


def tiny_flow_models(cache: Path | None = None) -> Path:
    """Return a folder that holds ``flux``, ``sd3`` and their preview decoder ``taef1``, built at the first call.

    Args:
        cache: as in :func:`drumline.testing.tiny.tiny_models`.
    """
    savers = {
        "flux": lambda folder: save_pipeline(build_flux(), folder),
        "sd3": lambda folder: save_pipeline(build_sd3(), folder),
        "taef1": lambda folder: save_taesd(folder, scaling_factor=0.5),
    }
    return built_once(savers, RECIPE, cache)


def build_flux(seed: int = 0, heads: int = 4, guidance: bool = True) -> Any:
    """Return a tiny ``FluxPipeline`` in float32 on the CPU: 2 double and 4 single blocks, text of 64 tokens.

    Args:
        seed: of the weights.
        heads: of attention, 16 wide each.
        guidance: whether the guidance scale is an input of the model, as in FLUX.1-dev.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with seeded(seed):
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(shift_factor=_SHIFT, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5),
            text_encoder=clip_text(projection=False),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_text(width=32),
            tokenizer_2=t5_tokenizer(),
            transformer=flux_transformer(heads=heads, guidance=guidance),
        )


def build_sd3(seed: int = 0) -> Any:
    """Return a tiny ``StableDiffusion3Pipeline`` in float32 on the CPU: 4 blocks, text of 77 + 64 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,  # both text encoders
            pos_embed_max_size=64,
            dual_attention_layers=(0,),  # as in 3.5: a second attention over the image alone
            qk_norm="rms_norm",
        ).eval()
        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(shift_factor=_SHIFT, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5),
            text_encoder=clip_text(projection=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(projection=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_text(width=64),
            tokenizer_3=t5_tokenizer(),
            transformer=transformer,
        )


def flux_transformer(heads: int = 4, guidance: bool = True) -> torch.nn.Module:
    """Return the transformer of :func:`build_flux`, from torch's current seed."""
    from diffusers import FluxTransformer2DModel

    model: torch.nn.Module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * 4,  # 2x2 latents of 4 channels make one token
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return model


def t5_text(width: int) -> Any:
    """Return a T5 encoder for :func:`t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128, d_model=width, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def t5_tokenizer() -> Any:
    """Return a T5-like tokenizer with one id per ASCII character."""
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(chr(i), -3.0) for i in range(33, 127)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=_T5_LENGTH)
