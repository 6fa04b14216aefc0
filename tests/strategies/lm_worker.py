"""All language model examples in one warm group, by name; and what only tests ask for."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from drumline.distributed import DistributedWorker
from drumline.errors import ConfigurationError
from drumline.signature import request_model
from drumline.testing.tiny_lm import build_llama, build_qwen3
from drumline.training import Batches, Pipeline, StagePlan, split_heads

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_app", EXAMPLES / name / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


APPS = {name: load(name) for name in ("lm_fsdp", "lm_pipeline", "lm_tensor")}


class Examples(DistributedWorker):
    def setup(self, only: list[str] | None = None, **kwargs: Any) -> None:
        self.workers = {}
        for name in only or APPS:
            worker = APPS[name].TrainLM(self.rank, self.world_size)
            worker.device, worker._services = self.device, self._services
            worker.setup(**kwargs)
            self.workers[name] = worker

    def __call__(self, streaming: bool = False, *, example: str, **payload: Any) -> dict[str, Any]:
        worker = self.workers.get(example)
        if worker is not None:
            return worker(streaming, **request_model(type(worker)).bind(payload))
        return getattr(self, example)(**payload)

    def refusal(self, of: str, model: str) -> dict[str, Any]:
        """Why the example `of` refuses to set up `model`."""
        worker = type(self.workers[of])(self.rank, self.world_size)
        worker.device = self.device
        try:
            worker.setup(model=model)
        except ConfigurationError as error:
            return {"error": str(error)}
        return {}

    def infer_after_a_step(self, schedule: str) -> dict[str, Any]:
        """Train one step, then the logits of the first batch, from the rank that has them."""
        model, app = build_llama(), APPS["lm_pipeline"]
        plan = StagePlan(len(model.model.layers), self.world_size, schedule, 4)
        stages = {i: app.Stage(model, plan, i) for i in plan.stages_of(self.rank)}
        pipeline = Pipeline(plan, stages, app.loss_of, self.device)
        tokens = torch.arange(4 * 9).reshape(4, 9)
        pipeline.step(tokens[:, :-1], tokens[:, 1:])  # gradients only: the parameters are as before
        logits = pipeline.infer(tokens[:, :-1])
        if plan.stages_of(self.rank)[-1] != plan.stages - 1:
            assert logits is None
            logits = torch.zeros(4, 8, model.config.vocab_size)
        torch.distributed.broadcast(logits, src=(plan.stages - 1) % self.world_size)
        return {"logits": logits}

    def eval_without_a_target(self) -> dict[str, Any]:
        """Infer with the schedule of a training: the last stage wants to compute a loss."""
        model, app = build_llama(), APPS["lm_pipeline"]
        plan = StagePlan(len(model.model.layers), self.world_size, "1f1b", 4)
        stages = {i: app.Stage(model, plan, i) for i in plan.stages_of(self.rank)}
        pipeline = Pipeline(plan, stages, app.loss_of, self.device)
        tokens = torch.arange(4 * 8).reshape(4, 8)
        pipeline._train.eval(*([tokens] if self.rank == 0 else []))
        return {}

    def split_qwen3(self, steps: int) -> dict[str, Any]:
        """Tensor parallel steps of a model with norms of queries and keys; the losses."""
        model = build_qwen3()
        split_heads(model.model, model.config.base_model_tp_plan, self.device)
        return {"losses": train_qwen3(model, steps)}


def train_qwen3(model: Any, steps: int) -> list[float]:
    """SGD with a high rate: a wrong gradient shows at once."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, foreach=False)
    losses = []
    for step in range(steps):
        tokens = (torch.arange(4 * 17).reshape(4, 17) * 7 + step) % 256
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_process(model: Any, data: torch.Tensor, batches: Batches, steps: int, rate_of: Any) -> list[float]:
    """Plain torch and transformers: the whole batch in one process. Trains ``model`` and returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        tokens = data[batches.of_step(step)]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
