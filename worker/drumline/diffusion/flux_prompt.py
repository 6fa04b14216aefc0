"""What a Flux image needs before its first step: noise, text, positions, time; and how a step moves the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Prepared:
    """One request, on this rank's device.

    Attributes:
        latents: packed, (1, image tokens, channels).
        text: embedded prompts, one per branch of guidance, (branches, text tokens, inner width).
        pooled: their pooled embeddings, (branches, width).
        rotary: cosines and sines of all positions, text first: each (tokens, head width).
        timesteps: one per step.
        sigmas: noise levels, one more than steps.
        guidance: input of distilled models, (1,), or None.
        width: pixels.
        height: pixels.
    """

    latents: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    guidance: torch.Tensor | None
    width: int
    height: int

    def temb(self, model: Any, step: int) -> torch.Tensor:
        """Return the embedding of time (and guidance) of a step, (branches, inner width), as the transformer makes it."""
        dtype = self.latents.dtype
        time = self.timesteps[step].expand(len(self.text)).to(dtype) / 1000
        time = time.to(dtype) * 1000
        if self.guidance is None:
            embedded: torch.Tensor = model.time_text_embed(time, self.pooled)
            return embedded
        guidance = self.guidance.expand(len(self.text)).to(dtype) * 1000
        with_guidance: torch.Tensor = model.time_text_embed(time, guidance, self.pooled)
        return with_guidance

    def advance(self, latents: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """Return ``latents`` after Euler's ``step``, as ``FlowMatchEulerDiscreteScheduler`` computes it."""
        change = self.sigmas[step + 1] - self.sigmas[step]
        return (latents.float() + change * velocity).to(velocity.dtype)

    def decode(self, pipeline: Any) -> torch.Tensor:
        """Return the image (1, 3, H, W) in 0..1."""
        config = pipeline.vae.config
        latents = pipeline._unpack_latents(self.latents, self.height, self.width, pipeline.vae_scale_factor)
        latents = latents / config.scaling_factor + config.shift_factor
        decoded = pipeline.vae.decode(latents, return_dict=False)[0]
        image: torch.Tensor = pipeline.image_processor.postprocess(decoded, output_type="pt")
        return image


def prepare(
    pipeline: Any,
    prompts: list[str | None],
    width: int,
    height: int,
    steps: int,
    guidance_scale: float,
    max_sequence_length: int,
    generator: torch.Generator | None,
) -> Prepared:
    """Do what ``FluxPipeline`` does before its first step, for one prompt per branch of guidance."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    model, device = pipeline.transformer, pipeline._execution_device
    encoded = [
        pipeline.encode_prompt(prompt, None, device=device, max_sequence_length=max_sequence_length)
        for prompt in prompts
    ]
    text_ids = encoded[0][2]
    latents, image_ids = pipeline.prepare_latents(
        1, model.config.in_channels // 4, height, width, encoded[0][0].dtype, device, generator
    )
    scheduler = pipeline.scheduler
    sigmas: Any = None
    if not scheduler.config.get("use_flow_sigmas", False):
        sigmas = np.linspace(1.0, 1 / steps, steps)
    mu = calculate_shift(
        latents.shape[1],
        *(scheduler.config.get(name, default) for name, default in _SHIFT.items()),
    )
    count: dict[str, Any] = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
    scheduler.set_timesteps(device=device, mu=mu, **count)
    pipeline._num_timesteps = len(scheduler.timesteps)
    guidance = None
    if model.config.guidance_embeds:
        guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32)
    return Prepared(
        latents=latents,
        text=torch.cat([model.context_embedder(one[0]) for one in encoded]),
        pooled=torch.cat([one[1] for one in encoded]),
        rotary=model.pos_embed(torch.cat((text_ids, image_ids))),
        timesteps=scheduler.timesteps,
        sigmas=scheduler.sigmas,
        guidance=guidance,
        width=width,
        height=height,
    )


_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
