"""SDXL with CFG parallelism: one GPU follows the prompt, the other the negative prompt. Nearly twice as fast.

drumline run examples/sdxl_cfg/app.yaml                      # two GPUs, the real SDXL
drumline run examples/sdxl_cfg/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 5 MB
"""

from __future__ import annotations

from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from pydantic import Field

from drumline.diffusion import AfterStep, ParallelPlan, Previews, describe, enable_cfg_parallel, join, picture
from drumline.distributed import DistributedWorker

Side = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]


class SdxlCfg(DistributedWorker):
    """Pairs of ranks: each rank runs one branch of guidance. More than one pair: as many images."""

    def setup(self, model: str = "stabilityai/stable-diffusion-xl-base-1.0", vae: str = "madebyollin/taesdxl") -> None:
        """Check the plan, load the pipeline, split the UNet's batch.

        Args:
            model: repository or folder of an SDXL pipeline, or ``tiny``: a random one, built here, for tries and tests.
            vae: repository or folder of the previews' ``AutoencoderTiny``; the tiny model brings its own.
        """
        if model == "tiny":
            from drumline.testing import tiny

            folder = tiny.on_every_rank(tiny.tiny_models, self.rank)
            model, vae = str(folder / "sdxl"), str(folder / "taesd")
        plan = ParallelPlan(cfg=2, data=max(1, self.world_size // 2))
        plan.check(self.world_size, describe(model, StableDiffusionXLPipeline))  # before weights are loaded
        self.groups = join(plan, self)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        enable_cfg_parallel(self.pipeline.unet, self.groups)
        self.previews = Previews(AutoencoderTiny.from_pretrained(vae, dtype=dtype).to(self.device), self.groups)

    def __call__(
        self,
        streaming: bool = False,
        *,
        prompt: str = "A lighthouse at dusk",
        negative_prompt: str = "blurry, low quality",
        width: Side = 1024,
        height: Side = 1024,
        num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 20,
        guidance_scale: Annotated[float, Field(ge=0, le=20)] = 5.0,
        num_images_per_prompt: Annotated[int, Field(ge=1, le=8)] = 1,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Draw images: ``num_images_per_prompt`` by each pair of ranks.

        Args:
            streaming: send progress at every step and a preview at every fifth.
            prompt: what to draw.
            negative_prompt: what to keep away from.
            width: in pixels.
            height: in pixels.
            num_inference_steps: denoising steps.
            guidance_scale: how closely to follow the prompt; 1 or less turns guidance off, and its saving with it.
            num_images_per_prompt: images at once.
            seed: of the first pair's noise, the next pair has the next seed; without it every request differs.

        Returns:
            ``{"image": PIL image, "seed": the first pair's seed}`` on rank 0, several images in one grid.
        """
        seed = self.groups.seed(seed)  # the same noise on both ranks of a pair
        images = self.groups.gather(
            self.pipeline(
                prompt=prompt,
                negative_prompt=negative_prompt,
                width=width,
                height=height,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=self.groups.generator(seed),
                callback_on_step_end=AfterStep(self, streaming=streaming, previews=self.previews),
                output_type="pt",
            ).images
        )
        return {"image": self.picture(torch.cat(images)), "seed": seed} if images else {}

    picture = staticmethod(picture)
