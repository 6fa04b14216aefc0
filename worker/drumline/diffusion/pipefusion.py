"""PipeFusion for Flux, alone or with CFG parallelism and Ulysses: :class:`FluxSampler`.

The blocks are cut into stages, the image into patches. A stage works on one patch while the next stage works on the one
before. Attention needs the keys and values of the whole image: each block keeps those of the last step and replaces the
rows of the patch in hand, so all but the newest are one step old. Neighbouring steps are alike, hence the result is close
to the exact one, and the more so the more steps come first that treat the image as one patch (warm-up; they are exact).

The method is that of Fang et al., PipeFusion (arXiv 2405.14430). With Ulysses inside, the kept keys and values lie behind
the all-to-all: all tokens, this rank's heads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from drumline.diffusion.attention import FluxUlysses
from drumline.diffusion.groups import Groups
from drumline.diffusion.patches import Patch, merged, patches_of, stage_blocks
from drumline.diffusion.plan import PlanError
from drumline.errors import InvalidPayload

if TYPE_CHECKING:
    from drumline.diffusion.flux_prompt import Prepared

    StepEnd = Callable[[Any, int, Any, dict[str, Any]], Any]


class KeptAttention(FluxUlysses):
    """Attends to the keys and values of all tokens; those not in hand are of the last step."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.positions = torch.empty(0, dtype=torch.long)
        self.tokens = 0

    def remember(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the fresh rows at their positions, return all rows."""
        if self.kept is None:
            shape = (key.shape[0], self.tokens, *key.shape[2:])
            self.kept = key.new_empty(shape), value.new_empty(shape)
        for kept, fresh in zip(self.kept, (key, value), strict=True):
            kept[:, self.positions] = fresh
        return self.kept


class Stage:
    """The blocks of one rank, with what they keep."""

    def __init__(self, transformer: Any, groups: Groups) -> None:
        every = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        mine = stage_blocks(len(every), groups.plan.pipefusion, groups.place["pipefusion"])
        self.blocks = every[mine.start : mine.stop]
        self.attention = [KeptAttention(groups.group("ulysses")) for _ in self.blocks]
        for block, attention in zip(self.blocks, self.attention, strict=True):
            block.attn.set_processor(attention)
        # The others are dropped before the model moves to the device, which then holds this stage alone.
        double = len(transformer.transformer_blocks)
        transformer.transformer_blocks = torch.nn.ModuleList(every[mine.start : min(mine.stop, double)])
        transformer.single_transformer_blocks = torch.nn.ModuleList(every[max(mine.start, double) : mine.stop])
        transformer.register_forward_pre_hook(_refuse_forward)

    def forget(self, tokens: int) -> None:
        """Begin a request of ``tokens`` tokens."""
        for attention in self.attention:
            attention.kept, attention.tokens = None, tokens

    def run(
        self, text: torch.Tensor, image: torch.Tensor, temb: torch.Tensor, rotary: Any, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the blocks on this rank's tokens of a patch; ``positions`` are those of all ranks, rank by rank."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            attention.positions = positions
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        return text, image


def _refuse_forward(model: Any, _: Any) -> None:
    raise PlanError(
        f"this {type(model).__name__} holds the blocks of one stage, so a forward pass would be wrong: "
        "draw with the FluxSampler, not with the pipeline"
    )


class FluxSampler:
    """Draws with the parts of a ``FluxPipeline``, over ``cfg`` x ``pipefusion`` x ``ulysses`` ranks.

    It takes the place of the pipeline's ``__call__``, which hands the transformer the whole image at every step. Make it
    before the pipeline moves to the device: it drops the blocks of other stages. The pipeline itself then draws no more:
    its transformer raises ``PlanError``.

    Args:
        pipeline: a ``FluxPipeline`` on the CPU.
        groups: of the plan, which was checked against the model.
        patches: parts of the image that travel through the stages; at least as many as stages keeps them all busy.
        warmup: steps (at least 1) that treat the image as one patch: exact, but one stage works at a time.

    Raises:
        PlanError: a number is out of range, or the scheduler adds noise at each step.
    """

    def __init__(self, pipeline: Any, groups: Groups, *, patches: int = 4, warmup: int = 1) -> None:
        self.check(patches=patches, warmup=warmup)
        if pipeline.scheduler.config.get("stochastic_sampling", False):
            raise PlanError("stochastic_sampling=True: patches would draw their noise out of order; set it to False")
        self.pipeline = pipeline
        self.groups = groups
        self.patches = patches
        self.warmup = warmup
        self.stage = Stage(pipeline.transformer, groups)
        place, plan = groups.place, groups.plan
        self.first = place["pipefusion"] == 0
        self.last = place["pipefusion"] == plan.pipefusion - 1

    @staticmethod
    def check(*, patches: int, warmup: int) -> None:
        """Check the numbers that a sampler will be made with. Call it before weights are loaded.

        Raises:
            PlanError: one is out of range.
        """
        if patches < 1:
            raise PlanError(f"patches={patches}: use 1 or more")
        if warmup < 1:
            raise PlanError(f"warmup={warmup}: the first step has nothing to reuse; use 1 or more")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        width: int,
        height: int,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        true_cfg_scale: float = 1.0,
        max_sequence_length: int = 512,
        generator: torch.Generator | None = None,
        callback_on_step_end: StepEnd | None = None,
    ) -> torch.Tensor | None:
        """Draw one image; arguments as in ``FluxPipeline``. Call it on all ranks with the same ones.

        Args:
            prompt: what to draw.
            negative_prompt: what to keep away from; with ``true_cfg_scale`` above 1 it is the second branch.
            width: pixels.
            height: pixels.
            num_inference_steps: denoising steps.
            guidance_scale: input of models that were distilled from guidance.
            true_cfg_scale: of classifier-free guidance.
            max_sequence_length: text tokens.
            generator: of the noise, in the same state on all ranks.
            callback_on_step_end: as in diffusers, called on every rank when its part of a step is done. The first
                stage gets ``latents`` as they were before the step, since the others still work on it.

        Returns:
            The image (1, 3, H, W) in 0..1 on the rank that leads (:attr:`Groups.leads`); None on all others.

        Raises:
            InvalidPayload: ``cfg`` is 2 and the request has no second branch.
        """
        from drumline.diffusion.flux_prompt import prepare

        guided = negative_prompt is not None and true_cfg_scale > 1
        if self.groups.plan.cfg == 2 and not guided:
            raise InvalidPayload("cfg=2 needs two branches: give negative_prompt, and true_cfg_scale above 1")
        prompts: list[str | None] = [negative_prompt, prompt] if guided else [prompt]
        if self.groups.plan.cfg == 2:
            prompts = [prompts[self.groups.place["cfg"]]]
        prepared = prepare(
            self.pipeline, prompts, width, height, num_inference_steps, guidance_scale, max_sequence_length, generator
        )
        self._denoise(prepared, true_cfg_scale if guided else None, callback_on_step_end)
        return prepared.decode(self.pipeline) if self.groups.leads else None

    def _denoise(self, prepared: Prepared, scale: float | None, after_step: StepEnd | None) -> None:
        run = _Run(self, prepared, scale)
        for step in range(len(prepared.timesteps)):
            run.step(step)
            if after_step is None:
                continue
            run.collect()
            try:
                after_step(self.pipeline, step, prepared.timesteps[step], {"latents": prepared.latents})
            except BaseException:
                # All ranks leave after the same step. What the last stage has sent the first is still on its way, and
                # the next request must not find it.
                run.finish()
                raise
        run.finish()
        run.collect()


class _Run:
    """One request: who holds which tokens, and what is on its way."""

    def __init__(self, sampler: FluxSampler, prepared: Prepared, scale: float | None) -> None:
        self.sampler, self.prepared, self.scale = sampler, prepared, scale
        self.groups = groups = sampler.groups
        self.at = groups.place["ulysses"]
        self.text_tokens = prepared.text.shape[1]
        tokens = prepared.latents.shape[1]
        self.split = patches_of(tokens, self.text_tokens, sampler.patches, groups.plan.ulysses)
        self.whole = [merged(self.split)]
        self.incoming: deque[torch.Tensor] = deque()  # rows that the last stage sends the first, in order
        self.sent: list[tuple[Any, torch.Tensor]] = []
        self.indices: dict[tuple[range, ...], torch.Tensor] = {}
        at = groups.place["pipefusion"]
        self.next, self.previous = groups.peer("pipefusion", at + 1), groups.peer("pipefusion", at - 1)
        sampler.stage.forget(self.text_tokens + tokens)

    def step(self, step: int) -> None:
        """Run all patches of a step through this stage."""
        prepared, sampler = self.prepared, self.sampler
        patches = self.whole if step < sampler.warmup else self.split
        temb = prepared.temb(sampler.pipeline.transformer, step)
        if step == sampler.warmup:
            self._receive_all()  # the warm-up's last step comes as one patch
        for patch in patches:
            self._one(patch, step, temb, len(patches))
        self.sent = [pair for pair in self.sent if not pair[0].is_completed()]

    def finish(self) -> None:
        """Wait for what is on its way, and forget the request."""
        self._receive_all()
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()
        self.sampler.stage.forget(0)

    def collect(self) -> None:
        """On the first stage, put the latents of all ``ulysses`` ranks together."""
        group = self.groups.group("ulysses")
        if self.sampler.first and group is not None:
            latents = self.prepared.latents
            parts = [torch.empty_like(latents) for _ in range(group.size())]
            dist.all_gather(parts, latents.contiguous(), group=group)
            for rank, part in enumerate(parts):
                rows = self._rows(self.whole[0], rank)
                latents[:, rows] = part[:, rows]

    def _one(self, patch: Patch, step: int, temb: torch.Tensor, patches: int) -> None:
        prepared, sampler, model = self.prepared, self.sampler, self.sampler.pipeline.transformer
        words, rows = self._words(patch, self.at), self._rows(patch, self.at)
        positions = torch.cat([self._positions(patch, rank) for rank in range(self.groups.plan.ulysses)])
        mine = self._positions(patch, self.at)
        rotary = tuple(table[mine] for table in prepared.rotary)
        if sampler.first:
            if len(self.incoming) == patches:  # those of the last step, this patch's first
                self._receive()
            if not sampler.last:
                self.incoming.append(rows)
            image = model.x_embedder(prepared.latents[:, rows]).repeat(len(prepared.text), 1, 1)
            text = prepared.text[:, words]
        else:
            shape = (len(prepared.text), len(words) + len(rows), model.inner_dim)
            hidden = torch.empty(shape, dtype=prepared.text.dtype, device=prepared.text.device)
            dist.recv(hidden, self.previous, group=self.groups.group("pipefusion"))
            text, image = hidden[:, : len(words)], hidden[:, len(words) :]
        text, image = sampler.stage.run(text, image, temb, rotary, positions)
        if not sampler.last:
            self._send(torch.cat((text, image), dim=1), self.next, self.groups.group("pipefusion"))
            return
        velocity = self._guided(model.proj_out(model.norm_out(image, temb)))
        fresh = prepared.advance(prepared.latents[:, rows], velocity, step)
        prepared.latents[:, rows] = fresh
        if not sampler.first:
            self._send(fresh, self.next, self.groups.backward)

    def _guided(self, output: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return output
        group = self.groups.group("cfg")
        if group is None:
            negative, positive = output.chunk(2)
        else:
            negative, positive = (torch.empty_like(output) for _ in range(2))
            dist.all_gather([negative, positive], output.contiguous(), group=group)
        return negative + self.scale * (positive - negative)

    def _send(self, tensor: torch.Tensor, to: int, group: dist.ProcessGroup | None) -> None:
        tensor = tensor.contiguous()
        self.sent.append((dist.isend(tensor, to, group=group), tensor))

    def _receive(self) -> None:
        rows = self.incoming.popleft()
        fresh = torch.empty_like(self.prepared.latents[:, rows])
        dist.recv(fresh, self.previous, group=self.groups.backward)
        self.prepared.latents[:, rows] = fresh

    def _receive_all(self) -> None:
        while self.incoming:
            self._receive()

    def _words(self, patch: Patch, rank: int) -> torch.Tensor:
        return self._index((patch.text[rank],))

    def _rows(self, patch: Patch, rank: int) -> torch.Tensor:
        return self._index(patch.image[rank])

    def _positions(self, patch: Patch, rank: int) -> torch.Tensor:
        return torch.cat((self._words(patch, rank), self.text_tokens + self._rows(patch, rank)))

    def _index(self, parts: tuple[range, ...]) -> torch.Tensor:
        if parts not in self.indices:
            every = torch.cat([torch.arange(part.start, part.stop) for part in parts])
            self.indices[parts] = every.to(self.prepared.latents.device)
        return self.indices[parts]
