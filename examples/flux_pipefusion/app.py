"""FLUX with PipeFusion: each GPU holds a part of the layers, patches of the image travel through them.

drumline run examples/flux_pipefusion/app.yaml                      # two GPUs, FLUX.1-dev
drumline run examples/flux_pipefusion/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 3 MB
"""

from __future__ import annotations

from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from pydantic import Field

from drumline.diffusion import AfterStep, FluxSampler, ParallelPlan, Previews, describe, join, picture
from drumline.distributed import DistributedWorker

Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class FluxPipeFusion(DistributedWorker):
    """One image through all ranks: the first has the first layers, and so on. Needs little bandwidth between them."""

    def setup(
        self,
        model: str = "black-forest-labs/FLUX.1-dev",
        vae: str = "madebyollin/taef1",
        patches: int = 4,
        warmup: int = 2,
    ) -> None:
        """Check the plan, load the pipeline, keep this rank's layers.

        Args:
            model: repository or folder of a Flux pipeline, or ``tiny``: a random one, built here, for tries and tests.
            vae: repository or folder of the previews' ``AutoencoderTiny``; the tiny model brings its own.
            patches: parts of the image; at least as many as ranks keep all of them busy.
            warmup: first steps that are exact but not parallel.
        """
        if model == "tiny":
            from drumline.testing import tiny, tiny_flow

            folder = tiny.on_every_rank(tiny_flow.tiny_flow_models, self.rank)
            model, vae = str(folder / "flux"), str(folder / "taef1")
        self.plan = ParallelPlan(pipefusion=self.world_size)
        self.shape = describe(model, FluxPipeline)
        self.plan.check(self.world_size, self.shape)  # before weights are loaded
        FluxSampler.check(patches=patches, warmup=warmup)
        self.groups = join(self.plan, self)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        pipeline = FluxPipeline.from_pretrained(model, dtype=dtype)
        self.sampler = FluxSampler(pipeline, self.groups, patches=patches, warmup=warmup)
        pipeline.to(self.device)  # now, with this rank's layers alone
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
        patches = self.sampler.patches
        self.plan.check_request(
            self.shape, width=width, height=height, text_tokens=max_sequence_length, patches=patches
        )
        seed = self.groups.seed(seed)  # the same noise on all ranks
        images = self.sampler(
            prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            generator=self.groups.generator(seed),
            callback_on_step_end=AfterStep(self, streaming=streaming, previews=self.previews, size=(width, height)),
        )
        return {} if images is None else {"image": self.picture(images), "seed": seed}

    picture = staticmethod(picture)
