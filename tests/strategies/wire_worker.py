"""What each way to spread a model costs a rank: bytes written in one step, as the kernel counts them, and bytes held."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drumline.distributed import DistributedWorker
from drumline.testing.tiny_lm import build_llama
from drumline.training import Pipeline, StagePlan, replicate, shard, split_heads, zero1


def written() -> int:
    """Bytes that this process has passed to write calls, sockets included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def pipeline_example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "lm_pipeline" / "app.py"
    spec = importlib.util.spec_from_file_location("lm_pipeline_app", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes on this rank of whole or split tensors."""
    mine = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in mine)


class Wire(DistributedWorker):
    def __call__(self, *, way: str, batch: int = 0, length: int = 0) -> dict[str, Any]:
        self.modules: list[torch.nn.Module] = []
        self.optimizers: list[Any] = []
        self.cache = 0
        if way.startswith("flux "):
            step = self.flux(way.removeprefix("flux "))
        else:
            tokens = torch.arange(batch * (length + 1)).reshape(batch, length + 1) % 256
            step = self.language(way.partition("=")[0], tokens)
        for _ in range(2):  # buffers are made, buckets laid out
            step()
        dist.barrier()
        before = written()
        step()
        found = {"sent": written() - before, **self.holds(), "cache": self.cache}
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, found)
        return {name: [each[name] for each in everyones] for name in found}

    def holds(self) -> dict[str, int]:
        """Parameters, and what training adds to them, between two steps."""
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        states = [getattr(each, "optim", each).state for each in self.optimizers]  # ZeRO-1 has its own optimizer inside
        moments = [
            value for state in states for each in state.values() for name, value in each.items() if name != "step"
        ]
        return {"weights": held(parameters), "state": held([p.grad for p in parameters]) + held(moments)}

    def language(self, way: str, tokens: torch.Tensor) -> Callable[[], None]:
        model: Any = build_llama().train()
        mine = tokens[self.rank :: self.world_size]
        if way == "pipeline":
            app = pipeline_example()
            plan = StagePlan(8, self.world_size, "1f1b", 8)
            stages = {i: app.Stage(model, plan, i) for i in plan.stages_of(self.rank)}
            pipeline = Pipeline(plan, stages, app.loss_of, self.device)
            self.modules = list(stages.values())
            self.optimizers = [torch.optim.AdamW(stage.parameters()) for stage in stages.values()]

            def through_stages() -> None:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                pipeline.step(tokens[:, :-1], tokens[:, 1:])
                for optimizer in self.optimizers:
                    optimizer.step()

            return through_stages
        if way.startswith("data"):
            model = replicate(model, self.device)
            optimizer: Any = torch.optim.AdamW(model.parameters())
        elif way == "zero-1":
            model = replicate(model, self.device)
            optimizer = zero1(model.parameters(), torch.optim.AdamW)
        elif way == "tensor":
            split_heads(model.model, model.config.base_model_tp_plan, self.device)
            optimizer, mine = torch.optim.AdamW(model.parameters(), foreach=False), tokens
        else:
            model = shard(model, model.model.layers, self.device, keep_gathered=way == "zero-2")
            optimizer = torch.optim.AdamW(model.parameters())

        self.modules, self.optimizers = [model], [optimizer]

        def step() -> None:
            logits = model(input_ids=mine[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def flux(self, way: str) -> Callable[[], None]:
        from drumline.diffusion import ParallelPlan, enable_context_parallel, join
        from drumline.testing.tiny_flow import build_flux

        name, _, size = way.partition("=")
        groups = join(ParallelPlan(**{name: int(size)}), self)
        if name == "pipefusion":
            return self.stages(groups)
        model = build_flux().transformer
        if name == "tensor":
            from drumline.diffusion import enable_tensor_parallel

            enable_tensor_parallel(model, groups)
        else:
            enable_context_parallel(model, groups)
        self.modules = [model]
        tokens = 16 * 16
        inputs = {
            "hidden_states": torch.zeros(1, tokens, 16),
            "encoder_hidden_states": torch.zeros(1, 64, 32),
            "pooled_projections": torch.zeros(1, 32),
            "timestep": torch.zeros(1),
            "guidance": torch.zeros(1),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(64, 3),
            "return_dict": False,
        }

        def step() -> None:
            with torch.no_grad():
                model(**inputs)

        return step

    def stages(self, groups: Any) -> Callable[[], None]:
        """A step of PipeFusion cannot be had alone: the whole request, and what is kept between its steps."""
        from drumline.diffusion import FluxSampler
        from drumline.testing.tiny_flow import build_flux

        pipeline = build_flux()
        sampler = FluxSampler(pipeline, groups)
        self.modules = [pipeline.transformer]

        def after_step(*_: Any) -> None:
            self.cache = held(tensor for attention in sampler.stage.attention for tensor in attention.kept or ())

        def request() -> None:
            size = {"width": 256, "height": 256, "num_inference_steps": 2, "max_sequence_length": 64}
            sampler("a cat", **size, generator=groups.generator(1), callback_on_step_end=after_step)

        return request
