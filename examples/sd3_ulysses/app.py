"""Stable Diffusion 3.5 with Ulysses, which diffusers alone gets silently wrong.

drumline run examples/sd3_ulysses/app.yaml                      # two GPUs, SD 3.5 medium
drumline run examples/sd3_ulysses/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 2 MB
"""

from __future__ import annotations

from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from pydantic import Field

from drumline.diffusion import AfterStep, ParallelPlan, Previews, describe, enable_context_parallel, join, picture
from drumline.distributed import DistributedWorker

CLIP_TOKENS = 77  # come before those of max_sequence_length
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class Sd3Ulysses(DistributedWorker):
    """One image on all ranks: each has a part of the tokens, and in attention a part of the heads."""

    def setup(self, model: str = "stabilityai/stable-diffusion-3.5-medium", vae: str = "madebyollin/taesd3") -> None:
        """Check the plan, load the pipeline, split the transformer's sequence.

        Args:
            model: repository or folder of a Stable Diffusion 3 pipeline, or ``tiny``: a random one, for tries and tests.
            vae: repository or folder of the previews' ``AutoencoderTiny``; the tiny model brings its own.
        """
        if model == "tiny":
            from drumline.testing import tiny, tiny_flow

            folder = tiny.on_every_rank(tiny_flow.tiny_flow_models, self.rank)
            model, vae = str(folder / "sd3"), str(folder / "taef1")
        self.plan = ParallelPlan(ulysses=self.world_size)
        self.shape = describe(model, StableDiffusion3Pipeline)
        self.plan.check(self.world_size, self.shape)  # before weights are loaded
        self.groups = join(self.plan, self)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        enable_context_parallel(self.pipeline.transformer, self.groups)
        self.previews = Previews(AutoencoderTiny.from_pretrained(vae, dtype=dtype).to(self.device), self.groups)

    def __call__(
        self,
        streaming: bool = False,
        *,
        prompt: str = "A lighthouse at dusk",
        negative_prompt: str = "",
        width: Side = 1024,
        height: Side = 1024,
        num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 28,
        guidance_scale: Annotated[float, Field(ge=0, le=20)] = 4.5,
        max_sequence_length: Annotated[int, Field(ge=16, le=512)] = 307,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Draw one image.

        Args:
            streaming: send progress at every step and a preview at every fifth.
            prompt: what to draw.
            negative_prompt: what to keep away from.
            width: in pixels.
            height: in pixels.
            num_inference_steps: denoising steps.
            guidance_scale: how closely to follow the prompt.
            max_sequence_length: text tokens of T5; with CLIP's 77 they must be a multiple of the ranks.
            seed: of the noise; without it every request differs.

        Returns:
            ``{"image": PIL image, "seed": the seed}`` on rank 0.
        """
        text_tokens = CLIP_TOKENS + max_sequence_length
        self.plan.check_request(self.shape, width=width, height=height, text_tokens=text_tokens)
        seed = self.groups.seed(seed)  # the same noise on all ranks
        images = self.pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            generator=self.groups.generator(seed),
            callback_on_step_end=AfterStep(self, streaming=streaming, previews=self.previews),
            output_type="pt",
        ).images
        return {"image": self.picture(images), "seed": seed}

    picture = staticmethod(picture)
