"""What goes wrong in diffusers' parallelism when nobody guards it, on real ranks. Each method of `Traps` is one trap."""

from typing import Any

import torch
import torch.distributed as dist

from drumline.diffusion import (
    FluxSampler,
    Groups,
    ParallelPlan,
    PlanError,
    compat,
    enable_cfg_parallel,
    enable_context_parallel,
    enable_tensor_parallel,
    load_tensor_parallel,
)
from drumline.distributed import DistributedWorker
from drumline.errors import InvalidPayload
from drumline.testing import tiny, tiny_flow


class Traps(DistributedWorker):
    def setup(self, model: str = "tiny") -> None:
        self.folder = tiny.on_every_rank(tiny_flow.tiny_flow_models, self.rank)

    def __call__(self, streaming: bool = False, *, trap: str, **more: Any) -> Any:
        with torch.no_grad():
            return getattr(self, trap)(**more)

    # -- what the traps have in common

    def load(self, kind: str) -> Any:
        import diffusers

        cls = {"flux": diffusers.FluxTransformer2DModel, "sd3": diffusers.SD3Transformer2DModel}[kind]
        return cls.from_pretrained(self.folder / kind, subfolder="transformer")

    def groups(self, **plan: int) -> Groups:
        return Groups(ParallelPlan(**plan), self.rank, self.device)

    def worst(self, one: torch.Tensor, other: torch.Tensor) -> float:
        difference = (one - other).abs().max()
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        return float(difference)

    @staticmethod
    def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
        try:
            call(*args, **kwargs)
        except (PlanError, InvalidPayload) as error:
            return str(error)
        return ""

    # -- the traps

    def sd3(self) -> Any:
        """With a plan of one's own diffusers accepts SD3, whose processors ignore it."""
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        alone = self.load("sd3")(**sd3_inputs())[0]
        split = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
        plan = {
            "pos_embed": split,
            "context_embedder": split,
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }
        groups = self.groups(ulysses=self.world_size)
        theirs = self.load("sd3")
        with compat.on(self.device):
            config = ContextParallelConfig(ulysses_degree=self.world_size, mesh=groups.mesh("ring", "ulysses"))
            theirs.enable_parallelism(config=config, cp_plan=plan)
        ours = self.load("sd3")
        enable_context_parallel(ours, groups)
        return {
            "theirs": self.worst(theirs(**sd3_inputs())[0], alone),
            "ours": self.worst(ours(**sd3_inputs())[0], alone),
            "refusal": self.refusal(enable_context_parallel, self.load("sd3"), groups, own=False),
        }

    def cpu(self) -> Any:
        """On CPU ranks diffusers divides by the number of accelerators, and knows no tensor parallelism."""
        from diffusers import ContextParallelConfig, TensorParallelConfig

        def failure(config: Any) -> str:
            try:
                self.load("flux").enable_parallelism(config=config)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return ""

        before = torch.accelerator.device_count
        found = {"context": failure(ContextParallelConfig(ulysses_degree=self.world_size))}
        enable_tensor_parallel(self.load("flux"), self.groups(tensor=self.world_size))
        found["tensor"] = failure(TensorParallelConfig(tp_degree=self.world_size))
        return {**found, "restored": torch.accelerator.device_count is before}

    def uneven(self) -> Any:
        """Diffusers has a bare assertion for tokens that it cannot split."""
        found = {}
        for own in (False, True):
            model = self.load("flux")
            enable_context_parallel(model, self.groups(ulysses=self.world_size), own=own)
            found[str(own)] = self.refusal(model, **flux_inputs(text=15))
        return found

    def anything(self) -> Any:
        """Diffusers can split uneven tokens in a mode of its own, which sends parts of different sizes."""
        from diffusers import ContextParallelConfig

        model = self.load("flux")
        mesh = self.groups(ulysses=self.world_size).mesh("ring", "ulysses")
        with compat.on(self.device):
            model.enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=self.world_size, ulysses_anything=True, mesh=mesh)
            )
        try:
            model(**flux_inputs(text=15))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def shared_memory(self) -> Any:
        """What ranks share has no name, so a rank that ends cannot unlink it: nothing is for a resource tracker."""
        from multiprocessing import resource_tracker
        from pathlib import Path

        maps = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        return {
            "shared": sorted({line[5] for line in maps if line[1] == "rw-s"}),
            "tracker": resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
        }

    def twice(self) -> Any:
        """Parallelism goes on once."""
        sequence, tensor = self.groups(ulysses=self.world_size), self.groups(tensor=self.world_size)
        cfg = self.groups(cfg=2, data=self.world_size // 2)
        theirs, ours, weights, branches = (self.load(kind) for kind in ("flux", "flux", "flux", "sd3"))
        for _ in range(2):
            refusals = [
                self.refusal(enable_context_parallel, theirs, sequence),
                self.refusal(enable_context_parallel, ours, sequence, own=True),
                self.refusal(enable_tensor_parallel, weights, tensor),
                self.refusal(enable_cfg_parallel, branches, cfg),
            ]
        return refusals

    def lora(self) -> Any:
        """LoRA layers would stay whole beside split weights."""
        from peft import LoraConfig

        model = self.load("flux")
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        return self.refusal(enable_tensor_parallel, model, self.groups(tensor=self.world_size))

    def separate(self) -> Any:
        """Flux runs the branches of guidance one after the other: there is no batch to halve."""
        return self.refusal(enable_cfg_parallel, self.load("flux"), self.groups(cfg=2, data=self.world_size // 2))

    def fallback(self) -> Any:
        """Our own way for Flux, for the day when diffusers' experimental one is gone."""
        groups = self.groups(ulysses=self.world_size)
        ours, theirs = self.load("flux"), self.load("flux")
        alone = ours(**flux_inputs())[0]
        enable_context_parallel(ours, groups, own=True)
        enable_context_parallel(theirs, groups, own=False)
        return {
            "ours": self.worst(ours(**flux_inputs())[0], alone),
            "theirs": self.worst(theirs(**flux_inputs())[0], alone),
            "ring": self.refusal(
                enable_context_parallel, self.load("flux"), self.groups(ring=self.world_size), own=True
            ),
        }

    def beside(self) -> Any:
        """One kind of parallelism beside another: each talks to its own group."""
        alone = {"flux": self.load("flux")(**flux_inputs())[0], "sd3": self.load("sd3")(**sd3_inputs())[0]}
        half = self.world_size // 2
        found = {}
        for kind, plan in (
            ("flux", {"data": 2, "ulysses": half}),
            ("flux", {"data": 2, "tensor": half}),
            ("flux", {"data": 2, "ring": half}),
            ("sd3", {"cfg": 2, "ulysses": half}),
        ):
            groups, model = self.groups(**plan), self.load(kind)
            enable_context_parallel(model, groups)
            enable_tensor_parallel(model, groups)
            enable_cfg_parallel(model, groups)
            out = model(**(flux_inputs() if kind == "flux" else sd3_inputs()))[0]
            seeds = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
            dist.all_gather(seeds, torch.tensor([groups.seed(5)]))
            gathered = groups.gather(torch.tensor([self.rank]))
            found[str(groups.plan)] = {
                "difference": self.worst(out, alone[kind]),
                "seeds": [int(seed) for seed in seeds],
                "gathered": gathered and [int(rank) for rank in gathered],
            }
        return found

    def stages(self, failing: int | None = None) -> Any:
        """A rank fails between two steps, while patches of the image are on their way between stages."""
        from diffusers import FluxPipeline

        if not hasattr(self, "sampler"):
            pipeline = FluxPipeline.from_pretrained(self.folder / "flux")
            self.sampler = FluxSampler(pipeline, self.groups(pipefusion=self.world_size), warmup=1)

        def after_step(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> None:
            self.checkpoint()
            if step == 2 and self.rank == failing:
                raise RuntimeError("out of paint")

        size = {"width": 64, "height": 64, "num_inference_steps": 6, "max_sequence_length": 16}
        noise = torch.Generator().manual_seed(1)
        return {"image": self.sampler("a cat", **size, generator=noise, callback_on_step_end=after_step)}

    def weights(self) -> Any:
        """Every rank holds its slices only, whether split in memory or while loading."""
        from diffusers import FluxTransformer2DModel

        groups = self.groups(tensor=self.world_size)
        alone, split = self.load("flux"), self.load("flux")
        enable_tensor_parallel(split, groups)
        loaded = load_tensor_parallel(FluxTransformer2DModel, str(self.folder / "flux"), groups, dtype=torch.float32)
        whole = held(alone)
        expected = alone(**flux_inputs())[0]
        return {
            "differences": [self.worst(model(**flux_inputs())[0], expected) for model in (split, loaded)],
            "held": [held(model) / whole for model in (split, loaded)],
        }


def held(model: Any) -> int:
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())


def flux_inputs(text: int = 16) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=random),
        "encoder_hidden_states": torch.randn(1, text, 32, generator=random),
        "pooled_projections": torch.randn(1, 32, generator=random),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def sd3_inputs() -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=random),
        "encoder_hidden_states": torch.randn(2, 16, 64, generator=random),
        "pooled_projections": torch.randn(2, 64, generator=random),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }
