"""FLUX with Ulysses inside of Ring: more GPUs for one image than its heads allow.

drumline run examples/flux_usp/app.yaml                      # four GPUs, FLUX.1-dev
drumline run examples/flux_usp/app.yaml --setup model=tiny   # any laptop: four CPU ranks, a random model of 3 MB
"""

from __future__ import annotations

from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from pydantic import Field

from drumline.diffusion import AfterStep, ParallelPlan, Previews, describe, enable_context_parallel, join, picture
from drumline.distributed import DistributedWorker

Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class FluxUsp(DistributedWorker):
    """One image on all ranks: heads are split over neighbours (Ulysses), keys and values over groups of them (Ring)."""

    def setup(
        self, model: str = "black-forest-labs/FLUX.1-dev", vae: str = "madebyollin/taef1", ulysses: int = 2
    ) -> None:
        """Check the plan, load the pipeline, split the transformer's sequence.

        Args:
            model: repository or folder of a Flux pipeline, or ``tiny``: a random one, built here, for tries and tests.
            vae: repository or folder of the previews' ``AutoencoderTiny``; the tiny model brings its own.
            ulysses: ranks that split the heads; the ring has as many parts as there are such groups.
        """
        if model == "tiny":
            from drumline.testing import tiny, tiny_flow

            folder = tiny.on_every_rank(tiny_flow.tiny_flow_models, self.rank)
            model, vae = str(folder / "flux"), str(folder / "taef1")
        self.plan = ParallelPlan(ulysses=ulysses, ring=max(1, self.world_size // ulysses))
        self.shape = describe(model, FluxPipeline)
        self.plan.check(self.world_size, self.shape)  # before weights are loaded
        self.groups = join(self.plan, self)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline = FluxPipeline.from_pretrained(model, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        enable_context_parallel(self.pipeline.transformer, self.groups)
        self.previews = Previews(AutoencoderTiny.from_pretrained(vae, dtype=dtype).to(self.device), self.groups)

    def __call__(
        self,
        streaming: bool = False,
        *,
        prompt: str = "A lighthouse at dusk",
        width: Side = 1024,
        height: Side = 1024,
        num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 28,
        guidance_scale: Annotated[float, Field(ge=0, le=20)] = 3.5,
        max_sequence_length: Annotated[int, Field(ge=16, le=512)] = 512,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Draw one image.

        Args:
            streaming: send progress at every step and a preview at every fifth.
            prompt: what to draw.
            width: in pixels.
            height: in pixels.
            num_inference_steps: denoising steps.
            guidance_scale: how closely to follow the prompt.
            max_sequence_length: text tokens.
            seed: of the noise; without it every request differs.

        Returns:
            ``{"image": PIL image, "seed": the seed}`` on rank 0.
        """
        self.plan.check_request(self.shape, width=width, height=height, text_tokens=max_sequence_length)
        seed = self.groups.seed(seed)  # the same noise on all ranks
        images = self.pipeline(
            prompt=prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            generator=self.groups.generator(seed),
            callback_on_step_end=AfterStep(self, streaming=streaming, previews=self.previews, size=(width, height)),
            output_type="pt",
        ).images
        return {"image": self.picture(images), "seed": seed}

    picture = staticmethod(picture)
