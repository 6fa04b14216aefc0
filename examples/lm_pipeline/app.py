"""Train a language model whose layers are split over the ranks; microbatches follow each other through them.

drumline run examples/lm_pipeline/app.yaml                      # GPUs, the real model
drumline run examples/lm_pipeline/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 2 MB
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drumline.distributed import DistributedWorker
from drumline.errors import ConfigurationError, InvalidPayload
from drumline.testing.tiny import on_every_rank
from drumline.testing.tiny_lm import sums, tiny_llama
from drumline.toolkit import File
from drumline.training import (
    Batches,
    Checkpoints,
    Meter,
    Pipeline,
    StagePlan,
    exported,
    safetensors_file,
    seed_step,
    set_learning_rate,
    token_blocks,
    warmup_cosine,
)

SUPPORTED = ("llama", "qwen2", "qwen3")  # their layers need nothing but hidden states and positions


class TrainLM(DistributedWorker):
    """Full training of a causal language model, each rank with some of its layers."""

    def setup(self, model: str = "Qwen/Qwen3-8B", checkpoints: str = "checkpoints") -> None:
        """Read configuration and tokenizer; weights are loaded by each request, so that each starts from the same ones.

        Args:
            model: repository or folder of a causal language model, or ``tiny``: a random one, built here.
            checkpoints: folder for the checkpoints of all runs, shared by the ranks.
        """
        if model == "tiny":
            model = str(on_every_rank(tiny_llama, self.rank))
        self.model = model
        self.config = check(AutoConfig.from_pretrained(model), self.world_size)
        Pipeline.check(self.world_size, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.folder = Path(checkpoints)

    def build(self, plan: StagePlan) -> dict[int, Stage]:
        """Load the weights and keep this rank's layers; the others never reach the device."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return {i: Stage(model, plan, i).to(self.device).train() for i in plan.stages_of(self.rank)}

    def __call__(
        self,
        streaming: bool = False,
        *,
        run: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")],
        text: File | None = None,
        schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b",
        microbatches: Annotated[int, Field(ge=1, le=1024)] = 4,
        steps: Annotated[int, Field(ge=1, le=1_000_000)] = 100,
        batch: Annotated[int, Field(ge=1, le=4096)] = 8,
        length: Annotated[int, Field(ge=8, le=8192)] = 64,
        learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3,
        seed: int = 0,
        checkpoint_every: Annotated[int, Field(ge=1)] = 20,
    ) -> dict[str, Any]:
        """Train, or go on with a run that was killed or cancelled.

        Args:
            streaming: send progress at every step.
            run: name of the run; the same name goes on from its last checkpoint.
            text: what to learn, as plain text; without it sums such as ``17+25=42``.
            schedule: in which order microbatches run; the last two put two stages on each rank.
            microbatches: into which a batch is cut.
            steps: of the whole run.
            batch: samples per step, a multiple of ``microbatches``.
            length: tokens per sample.
            learning_rate: the highest one.
            seed: of the order of samples.
            checkpoint_every: steps.

        Returns:
            ``{"weights": File, "resumed_from": step, "losses": [one per step of this request]}`` on rank 0.
        """
        corpus = text.as_bytes().decode() if text else sums()
        data = token_blocks(corpus, self.tokenizer, length)
        batches = Batches(len(data), batch, seed)
        try:
            plan = StagePlan(self.config.num_hidden_layers, self.world_size, schedule, microbatches)
        except ConfigurationError as error:
            raise InvalidPayload(str(error)) from None
        plan.check_batch(batch)  # refused before weights are loaded
        stages = self.build(plan)
        parts = [(stage, torch.optim.AdamW(stage.parameters())) for stage in stages.values()]
        pipeline = Pipeline(plan, stages, loss_of, self.device)
        facts = {"model": self.model, "steps": steps, "batch": batch, "length": length}
        facts |= {"learning_rate": learning_rate, "seed": seed}
        checkpoints = Checkpoints(self.folder / run, self.device, run=facts)
        start = checkpoints.resume(parts)
        meter = Meter(self, steps, batch, start=start)
        losses = []
        for step in range(start, steps):
            self.checkpoint()  # a cancelled request ends here, on all ranks at the same step
            seed_step(seed, step, self.rank)
            rate = warmup_cosine(step, total=steps, peak=learning_rate, warmup=steps // 10)
            set_learning_rate([optimizer for _, optimizer in parts], rate)
            tokens = data[batches.of_step(step)].to(self.device)
            losses.append(pipeline.step(tokens[:, :-1], tokens[:, 1:]))
            for _, optimizer in parts:
                optimizer.step()
                optimizer.zero_grad()
            meter.report(step + 1, loss=losses[-1], lr=rate)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                checkpoints.save(step + 1, parts)
        if self.rank != 0:
            return {}
        weights = exported(checkpoints.path(steps))
        return {"weights": safetensors_file(weights, f"{run}.safetensors"), "resumed_from": start, "losses": losses}


class Stage(torch.nn.Module):
    """Some layers of a model under the names that they have in the whole one, so that checkpoints fit any split."""

    def __init__(self, whole: Any, plan: StagePlan, number: int) -> None:
        super().__init__()
        first, last = number == 0, number == plan.stages - 1
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict()})
        for i in plan.layers_of(number):
            self.model["layers"][str(i)] = whole.model.layers[i]
        if first:
            self.model["embed_tokens"] = whole.model.embed_tokens
        if last:
            self.model["norm"], self.lm_head = whole.model.norm, whole.lm_head
        self.rotary = whole.model.rotary_emb  # computed, not trained: every stage has its own
        self.first, self.last = first, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take tokens (N, T) or hidden states (N, T, C); return hidden states or logits (N, T, V)."""
        hidden = self.model["embed_tokens"](x) if self.first else x
        positions = self.rotary(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        for layer in self.model["layers"].values():
            hidden = layer(hidden, position_embeddings=positions)
        return self.lm_head(self.model["norm"](hidden)) if self.last else hidden


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of logits (N, T, V) and tokens (N, T)."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def check(config: Any, ranks: int) -> Any:
    """Return ``config`` if the model can be split into stages.

    Raises:
        ConfigurationError: it cannot; the message says why.
    """
    if config.model_type not in SUPPORTED:
        raise ConfigurationError(f"model: {config.model_type} cannot be cut here; use one of {', '.join(SUPPORTED)}")
    if config.tie_word_embeddings and ranks > 1:
        raise ConfigurationError(
            "model: its first and last layer share their weights (tie_word_embeddings), which would then lie on two ranks; "
            "use lm_fsdp, or a model without tied embeddings"
        )
    StagePlan(config.num_hidden_layers, ranks, "gpipe")
    return config
