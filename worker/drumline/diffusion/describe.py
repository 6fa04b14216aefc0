"""What a plan has to know about a model, read from its configuration: no weights are loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from drumline.diffusion.compat import diffusers_splits_sequences
from drumline.diffusion.own_plans import OWN_PLANS
from drumline.diffusion.plan import ModelShape, PlanError

#: Denoisers whose pipelines run both branches of guidance in one forward, and those that run one after the other.
GUIDANCE = {
    "FluxTransformer2DModel": "separate",
    "SD3Transformer2DModel": "batched",
    "UNet2DConditionModel": "batched",
}
#: Latents along one side of an image token, where the denoiser's configuration has none.
_PACKED = {"FluxTransformer2DModel": 2}


def describe(model: str | Path, pipeline: type[Any] | None = None) -> ModelShape:
    """Return the shape of the denoiser of a diffusers pipeline.

    Args:
        model: repository or folder. Of a repository only configuration files are downloaded.
        pipeline: the diffusers class that will load it; None for any.

    Raises:
        PlanError: it has no transformer or UNet, or of a class that this diffusers does not know, or of one that
            ``pipeline`` does not take.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(str(model))
    part = next((part for part in ("transformer", "unet") if index.get(part)), None)
    name = index[part][1] if part else ""
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise PlanError(f"{model}: no denoiser that diffusers {diffusers.__version__} knows (found {name or 'none'!r})")
    if pipeline is not None:
        _check_taken(str(model), cls, pipeline)
    config = cls.load_config(str(model), subfolder=part)
    vae = diffusers.AutoencoderKL.load_config(str(model), subfolder="vae")
    with torch.device("meta"):  # no memory, no weights
        empty = cls.from_config(config)
    return shape_of(empty, vae_scale=2 ** (len(vae.get("block_out_channels", ())) - 1))


def _check_taken(model: str, denoiser: type[Any], pipeline: type[Any]) -> None:
    # A model of another kind would be loaded whole before diffusers misses one of its parts.
    wanted = inspect.signature(pipeline, eval_str=True).parameters
    kinds = [wanted[part].annotation for part in ("transformer", "unet") if part in wanted]
    if kinds and not any(isinstance(kind, type) and issubclass(denoiser, kind) for kind in kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise PlanError(
            f"model: {model} has a {denoiser.__name__}, and {pipeline.__name__} takes a {names}; "
            f"use a model for {pipeline.__name__}"
        )


def shape_of(model: Any, vae_scale: int = 8) -> ModelShape:
    """Return the shape of a denoiser, which may be on the meta device.

    Args:
        model: a diffusers model.
        vae_scale: pixels along one side of a latent.
    """
    name = type(model).__name__
    bypassing = tuple(
        sorted(
            {
                type(processor).__name__
                for processor in getattr(model, "attn_processors", {}).values()
                if not hasattr(processor, "_parallel_config")
            }
        )
    )
    blocks = [*getattr(model, "transformer_blocks", ()), *getattr(model, "single_transformer_blocks", ())]
    own = name in OWN_PLANS
    theirs = getattr(model, "_cp_plan", None) is not None and not bypassing and diffusers_splits_sequences()
    side = _PACKED.get(name) or (getattr(model.config, "patch_size", None) if own else 0)
    return ModelShape(
        name=name,
        heads=getattr(model.config, "num_attention_heads", None) if blocks else None,
        blocks=len(blocks),
        sequence="diffusers" if theirs else "drumline" if own else None,
        bypassing=bypassing,
        tensor_widths=_tensor_widths(model),
        pipefusion=name == "FluxTransformer2DModel",
        guidance=GUIDANCE.get(name),  # type: ignore[arg-type]
        pixels_per_token=vae_scale * (side or 0),
    )


def _tensor_widths(model: Any) -> tuple[int, ...]:
    plan = getattr(model, "_tp_plan", None)
    if plan is None:
        return ()
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    specs = resolve_tp_shard_specs(model, plan, 1).values()
    return tuple(sorted({size for spec in specs for size in spec.block_sizes or ()}))
