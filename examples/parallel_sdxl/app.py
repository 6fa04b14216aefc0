"""One SDXL per GPU: every rank draws the same prompt from its own noise, rank 0 puts the images side by side.

drumline run examples/parallel_sdxl/app.yaml                      # two GPUs, the real SDXL
drumline run examples/parallel_sdxl/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 5 MB
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from PIL import Image, ImageFilter
from pydantic import Field

from drumline.diffusion import describe
from drumline.distributed import DistributedWorker

PREVIEW_EVERY = 5  # steps
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]


class ParallelSDXL(DistributedWorker):
    """Data parallel SDXL with live previews."""

    def setup(self, model: str = "stabilityai/stable-diffusion-xl-base-1.0", vae: str = "madebyollin/taesdxl") -> None:
        """Load the pipeline and the small decoder of the previews on this rank's device.

        Args:
            model: repository or folder of an SDXL pipeline, or ``tiny``: a random one, built here, for tries and tests.
            vae: repository or folder of an ``AutoencoderTiny``; the tiny model brings its own.
        """
        if model == "tiny":
            from drumline.testing.tiny import tiny_models

            if self.rank == 0:  # builds and saves it at the first call; transformers saves on no other rank
                tiny_models()
            dist.barrier()
            folder = tiny_models()
            model, vae = str(folder / "sdxl"), str(folder / "taesd")
        describe(model, StableDiffusionXLPipeline)  # a model of another kind is refused before its weights are loaded
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)  # progress() below says it
        self.preview_vae = AutoencoderTiny.from_pretrained(vae, dtype=dtype).to(self.device)

    def __call__(
        self,
        streaming: bool = False,
        *,
        prompt: str = "A fantasy landscape",
        negative_prompt: str = "blurry, low quality",
        width: Side = 1024,
        height: Side = 1024,
        num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 20,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Draw one image per rank.

        Args:
            streaming: send progress at every step and a preview at every fifth.
            prompt: what to draw.
            negative_prompt: what to keep away from.
            width: of one image, in pixels.
            height: of one image, in pixels.
            num_inference_steps: denoising steps.
            seed: rank r draws from the noise of ``seed + r``; without it every request differs.

        Returns:
            ``{"image": PIL image}`` on rank 0, all images in one grid.
        """

        def after_step(_: Any, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
            self.checkpoint()  # a cancelled request ends here, on all ranks at the same step
            if streaming:
                self.progress(step + 1, self.pipeline.num_timesteps)
                if step % PREVIEW_EVERY == 0:
                    self.send_preview(state["latents"], blur=float(timestep) / 100)
            return state

        image = self.pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            generator=None if seed is None else torch.Generator(self.device).manual_seed(seed + self.rank),
            callback_on_step_end=after_step,
            output_type="pt",
        ).images[0]
        images = self.gather(image)
        return {"image": grid(images)} if images else {}

    def send_preview(self, latents: torch.Tensor, blur: float) -> None:
        """Decode ``latents`` (1, 4, H/8, W/8) on every rank and stream the grid, less and less blurred."""
        decoded = self.preview_vae.decode(latents / self.preview_vae.config.scaling_factor, return_dict=False)[0]
        images = self.gather(self.pipeline.image_processor.postprocess(decoded, output_type="pt")[0])
        if images:
            self.add_streaming_result({"image": grid(images).filter(ImageFilter.GaussianBlur(blur))})

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Collect the ranks' tensors on rank 0, in rank order; None on the others."""
        tensor = tensor.contiguous()
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(tensor, tensors, dst=0)
        return tensors


def grid(images: list[torch.Tensor]) -> Image.Image:
    """Return images (3, H, W) in 0..1 as one picture, near to a square."""
    columns = ceil(sqrt(len(images)))
    height, width = images[0].shape[1:]
    sheet = Image.new("RGB", (columns * width, ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        pixels = (image.float().permute(1, 2, 0) * 255).round().to("cpu", torch.uint8)
        sheet.paste(Image.fromarray(pixels.numpy()), (i % columns * width, i // columns * height))
    return sheet
