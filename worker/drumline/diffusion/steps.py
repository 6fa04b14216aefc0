"""What a worker does after each denoising step: checkpoint, progress, previews."""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import torch

from drumline.diffusion.groups import Groups

if TYPE_CHECKING:
    from PIL import Image

    from drumline.worker import DistributedWorker


class Previews:
    """Pictures of unfinished latents, through a small and fast decoder.

    Args:
        vae: a diffusers ``AutoencoderTiny`` on this rank's device.
        groups: of the plan.
        every: steps from one preview to the next; the first is after the first step.
    """

    def __init__(self, vae: Any, groups: Groups, every: int = 5) -> None:
        self.vae = vae
        self.groups = groups
        self.every = every

    @torch.no_grad()
    def picture(self, latents: torch.Tensor, shift: float = 0.0) -> Image.Image | None:
        """Return the grid of the images of all ``data``, on rank 0; None elsewhere. A collective over ``data``.

        Args:
            latents: (B, C, H/8, W/8), in the scale of the pipeline's own latents.
            shift: what the pipeline's VAE adds to latents.
        """
        if not self.groups.leads:
            return None
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + getattr(config, "shift_factor", shift)
        decoded = self.vae.decode(latents, return_dict=False)[0]
        images = self.groups.gather((decoded / 2 + 0.5).clamp(0, 1))
        return None if images is None else picture(torch.cat(images))


class AfterStep:
    """``callback_on_step_end`` of a diffusers pipeline; also called by :class:`drumline.diffusion.FluxSampler`.

    On every rank: a checkpoint, where a cancelled request ends on all ranks at the same step. When streaming also
    progress, and every few steps a preview.

    Args:
        worker: whose request it is.
        streaming: whether somebody reads updates.
        previews: None for none.
        size: width and height in pixels; needed for previews of packed latents (Flux).
    """

    def __init__(
        self,
        worker: DistributedWorker,
        *,
        streaming: bool,
        previews: Previews | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.worker = worker
        self.streaming = streaming
        self.previews = previews
        self.size = size

    def __call__(self, pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Run after ``step`` (from 0); ``state`` holds ``latents`` and is returned as it is.

        Raises:
            RequestCancelled: on all ranks at the same step, when the request was cancelled.
        """
        self.worker.checkpoint()
        if not self.streaming:
            return state
        self.worker.progress(step + 1, pipeline.num_timesteps)
        if self.previews is not None and step % self.previews.every == 0:
            latents = state["latents"]
            if latents.ndim == 3:
                assert self.size is not None, "packed latents: give AfterStep the size of the image"
                width, height = self.size
                latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
            image = self.previews.picture(latents)
            if image is not None:
                self.worker.add_streaming_result({"image": image})
        return state


def picture(images: torch.Tensor) -> Image.Image:
    """Return images (N, 3, H, W) in 0..1 as one picture, near to a square."""
    from PIL import Image

    columns = ceil(sqrt(len(images)))
    height, width = images.shape[2:]
    sheet = Image.new("RGB", (columns * width, ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        pixels = (image.float().permute(1, 2, 0) * 255).round().to("cpu", torch.uint8)
        sheet.paste(Image.fromarray(pixels.numpy()), (i % columns * width, i // columns * height))
    return sheet
