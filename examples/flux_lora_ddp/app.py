"""Teach FLUX a subject from a few pictures (a LoRA, data parallel), then draw with it.

drumline run examples/flux_lora_ddp/app.yaml                      # two GPUs, FLUX.1-dev
drumline run examples/flux_lora_ddp/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 3 MB
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
import torch.distributed as dist
from diffusers import FluxPipeline
from peft import LoraConfig
from pydantic import Field

from drumline.diffusion import describe
from drumline.distributed import DistributedWorker
from drumline.errors import InvalidPayload
from drumline.toolkit import Image
from drumline.training import (
    Batches,
    Checkpoints,
    Meter,
    exported,
    mean_over_ranks,
    replicate,
    safetensors_file,
    set_learning_rate,
    share,
    warmup_cosine,
)

TARGETS = r".*attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class FluxLora(DistributedWorker):
    """A request with pictures trains, one with a prompt alone draws with what was trained."""

    def setup(self, model: str = "black-forest-labs/FLUX.1-dev", checkpoints: str = "checkpoints") -> None:
        """Load the pipeline on this rank's device.

        Args:
            model: repository or folder of a Flux pipeline, or ``tiny``: a random one, built here.
            checkpoints: folder for the checkpoints of all runs, shared by the ranks.
        """
        if model == "tiny":
            from drumline.testing import tiny, tiny_flow

            model = str(tiny.on_every_rank(tiny_flow.tiny_flow_models, self.rank) / "flux")
        describe(model, FluxPipeline)  # a model of another kind is refused before its weights are loaded
        self.model = model
        self.folder = Path(checkpoints)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipeline = FluxPipeline.from_pretrained(model, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            getattr(self.pipeline, part).requires_grad_(False)

    def __call__(
        self,
        streaming: bool = False,
        *,
        run: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")],
        images: Annotated[list[Image], Field(max_length=1000)] | None = None,
        captions: list[str] | None = None,
        steps: Annotated[int, Field(ge=1, le=100_000)] = 500,
        batch: Annotated[int, Field(ge=1, le=256)] = 2,
        rank: Annotated[int, Field(ge=1, le=256)] = 16,
        learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4,
        checkpoint_every: Annotated[int, Field(ge=1)] = 100,
        prompt: str = "",
        size: Side = 512,
        num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 28,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Train a LoRA, or draw with it.

        Args:
            streaming: send progress at every step.
            run: name of the LoRA; training under the same name goes on from its last checkpoint.
            images: to learn from; without them a picture is drawn.
            captions: one for each image.
            steps: of the whole training.
            batch: images per training step, over all ranks.
            rank: of the LoRA.
            learning_rate: the highest one.
            checkpoint_every: steps.
            prompt: what to draw.
            size: side of the images in pixels, in training and drawing.
            num_inference_steps: of drawing.
            seed: of the training's order and noise, or of the picture's noise.

        Returns:
            On rank 0 ``{"lora": File, "losses", "resumed_from"}``, or ``{"image": PIL image}``.
        """
        if images is None:
            return self.draw(run, prompt, size, num_inference_steps, seed)
        if len(captions or ()) != len(images):
            raise InvalidPayload(f"captions: {len(captions or ())} for {len(images)} images; give one for each")
        batches = Batches(len(images), batch, seed)
        batches.mine(0, self.rank, self.world_size)  # a batch that does not fit is refused before anything is encoded
        data = self.prepare(images, captions or [], size)
        transformer = self.pipeline.transformer
        facts = {"model": self.model, "steps": steps, "batch": batch, "rank": rank, "size": size}
        facts |= {"learning_rate": learning_rate, "seed": seed, "images": len(images)}
        self.add_lora(rank)
        try:
            model = replicate(transformer.train(), self.device)
            optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad])
            parts = [(model, optimizer)]
            checkpoints = Checkpoints(self.folder / run, self.device, run=facts)
            start = checkpoints.resume(parts)
            meter = Meter(self, steps, batch, start=start)
            losses = []
            for step in range(start, steps):
                self.checkpoint()  # a cancelled request ends here, on all ranks at the same step
                rate = warmup_cosine(step, total=steps, peak=learning_rate, warmup=steps // 10)
                set_learning_rate([optimizer], rate)
                places = list(share(range(batch), self.rank, self.world_size))
                samples = [batches.of_step(step)[place] for place in places]
                generators = [batches.generator(step, place) for place in places]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    loss = flow_loss(model, {name: value[samples] for name, value in data.items()}, size, generators)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(mean_over_ranks(loss))
                meter.report(step + 1, loss=losses[-1], lr=rate)
                if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                    checkpoints.save(step + 1, parts)
        finally:
            self.remove_lora()
        if self.rank != 0:
            return {}
        weights = named(exported(checkpoints.path(steps)))
        return {"lora": safetensors_file(weights, f"{run}.safetensors"), "losses": losses, "resumed_from": start}

    def add_lora(self, rank: int) -> None:
        """Put an untrained LoRA into the transformer, the same on all ranks, with weights in float32."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        for parameter in self.pipeline.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def remove_lora(self) -> None:
        """Leave the transformer as it was loaded, whatever happened."""
        self.pipeline.transformer.delete_adapters("default")
        self.pipeline.transformer.eval()

    @torch.no_grad()
    def prepare(self, images: list[Image], captions: list[str], size: int) -> dict[str, torch.Tensor]:
        """Encode every image and caption on one rank, and hand the results to all."""
        mine = {}
        for i in share(range(len(images)), self.rank, self.world_size):
            mine[i] = self.encode(images[i], captions[i], size)
            self.progress(i + 1, len(images), phase="prepare")
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, {i: {k: v.cpu() for k, v in each.items()} for i, each in mine.items()})
        encoded = {i: each for part in everyones for i, each in part.items()}
        return {
            name: torch.stack([encoded[i][name] for i in range(len(images))]).to(self.device) for name in encoded[0]
        }

    def encode(self, image: Image, caption: str, size: int) -> dict[str, torch.Tensor]:
        """Return latents (C, H, W), text (T, D) and pooled text (P)."""
        pipeline = self.pipeline
        pixels = pipeline.image_processor.preprocess(image.to_pil(), height=size, width=size)
        vae = pipeline.vae
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        text, pooled, _ = pipeline.encode_prompt(caption, None, device=self.device)
        return {
            "latents": ((latents - vae.config.shift_factor) * vae.config.scaling_factor)[0],
            "text": text[0],
            "pooled": pooled[0],
        }

    def draw(self, run: str, prompt: str, size: int, steps: int, seed: int) -> dict[str, Any]:
        """Draw one picture with the newest checkpoint of ``run``."""
        checkpoints = Checkpoints(self.folder / run, self.device)
        step = checkpoints.latest()
        if not step:
            raise InvalidPayload(f"run: {run} has no checkpoint yet; train it with images first")

        def after_step(_: Any, done: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
            self.checkpoint()
            self.progress(done + 1, steps)
            return state

        pipeline = self.pipeline
        pipeline.load_lora_weights(named(exported(checkpoints.path(step))), adapter_name="default")
        try:
            generator = torch.Generator(self.device).manual_seed(seed)
            image = pipeline(
                prompt,
                width=size,
                height=size,
                num_inference_steps=steps,
                generator=generator,
                callback_on_step_end=after_step,
            ).images[0]
        finally:
            self.remove_lora()
        return {"image": image}


def named(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a LoRA's weights under the names that ``load_lora_weights`` of diffusers and other programs look for."""
    return {f"transformer.{name.replace('.default.', '.')}": value for name, value in weights.items()}


def flow_loss(
    transformer: Any, data: dict[str, torch.Tensor], size: int, generators: list[torch.Generator]
) -> torch.Tensor:
    """Return the mean flow matching loss of some samples; one generator each makes its noise and time."""
    latents = data["latents"].float()
    n, c, h, w = latents.shape
    noise = torch.stack([torch.randn(c, h, w, generator=g) for g in generators]).to(latents)
    time = torch.stack([torch.randn((), generator=g) for g in generators]).sigmoid().to(latents)
    mixed = (1 - time[:, None, None, None]) * latents + time[:, None, None, None] * noise
    text = data["text"]
    distilled = getattr(transformer, "module", transformer).config.guidance_embeds
    predicted = transformer(
        hidden_states=FluxPipeline._pack_latents(mixed, n, c, h, w).to(text.dtype),
        timestep=time,
        guidance=torch.ones_like(time) if distilled else None,
        encoder_hidden_states=text,
        pooled_projections=data["pooled"],
        txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, text.device, text.dtype),
        return_dict=False,
    )[0]
    target = FluxPipeline._pack_latents(noise - latents, n, c, h, w)
    return (predicted.float() - target).pow(2).mean()
