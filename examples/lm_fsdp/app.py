"""Train a language model whose parameters, gradients and optimizer state are split over the ranks (FSDP2, ZeRO).

drumline run examples/lm_fsdp/app.yaml                      # GPUs, the real model
drumline run examples/lm_fsdp/app.yaml --setup model=tiny   # any laptop: two CPU ranks, a random model of 2 MB
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

# At the top, not in setup(): the process that forks the ranks imports this file once for all of them.
import torch
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drumline.distributed import DistributedWorker
from drumline.errors import ConfigurationError
from drumline.testing.tiny import on_every_rank
from drumline.testing.tiny_lm import sums, tiny_llama
from drumline.toolkit import File
from drumline.training import (
    Batches,
    Checkpoints,
    Meter,
    exported,
    mean_over_ranks,
    replicate,
    safetensors_file,
    seed_step,
    set_learning_rate,
    shard,
    token_blocks,
    warmup_cosine,
    zero1,
)

Sharding = Literal["parameters", "gradients", "optimizer"]


class TrainLM(DistributedWorker):
    """Full training of a causal language model, ZeRO-1, 2 or 3."""

    def setup(self, model: str = "HuggingFaceTB/SmolLM2-1.7B", checkpoints: str = "checkpoints") -> None:
        """Read configuration and tokenizer; weights are loaded by each request, so that each starts from the same ones.

        Args:
            model: repository or folder of a causal language model, or ``tiny``: a random one, built here.
            checkpoints: folder for the checkpoints of all runs, shared by the ranks.
        """
        if model == "tiny":
            model = str(on_every_rank(tiny_llama, self.rank))
        self.model = model
        check(AutoConfig.from_pretrained(model))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.folder = Path(checkpoints)

    def build(self, sharding: Sharding) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Load the weights and split them."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(self.device).train()
        if sharding == "optimizer":
            whole = replicate(model, self.device)
            return whole, zero1(whole.parameters(), torch.optim.AdamW)
        model = shard(model, model.model.layers, self.device, keep_gathered=sharding == "gradients")
        return model, torch.optim.AdamW(model.parameters())

    def __call__(
        self,
        streaming: bool = False,
        *,
        run: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")],
        text: File | None = None,
        sharding: Sharding = "parameters",
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
            sharding: what is split: all (ZeRO-3), all but the parameters while a step runs (ZeRO-2), or only the
                optimizer's state (ZeRO-1).
            steps: of the whole run.
            batch: samples per step, over all ranks.
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
        batches.mine(0, self.rank, self.world_size)  # a batch that does not fit is refused before weights are loaded
        model, optimizer = self.build(sharding)
        parts = [(model, optimizer)]
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
            set_learning_rate([optimizer], rate)
            tokens = data[batches.mine(step, self.rank, self.world_size)].to(self.device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(mean_over_ranks(loss))
            meter.report(step + 1, loss=losses[-1], lr=rate)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                checkpoints.save(step + 1, parts)
        if self.rank != 0:
            return {}
        weights = exported(checkpoints.path(steps))
        return {"weights": safetensors_file(weights, f"{run}.safetensors"), "resumed_from": start, "losses": losses}


def check(config: Any) -> None:
    """Check that the model has layers to shard one by one.

    Raises:
        ConfigurationError: it has none where ``build`` looks for them.
    """
    try:
        with torch.device("meta"):  # no memory, no weights
            len(AutoModelForCausalLM.from_config(config).model.layers)
    except (AttributeError, ValueError):
        raise ConfigurationError(
            f"model: {config.model_type} is no language model with its layers in model.layers; use one such as llama or qwen3"
        ) from None
