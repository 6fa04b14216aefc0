"""Wrong plans: each has its own error, before weights are loaded. The models here have configurations and no weights."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drumline.diffusion import FluxSampler, Groups, ModelShape, ParallelPlan, PlanError, describe, join, shape_of
from drumline.testing import tiny, tiny_flow

EXAMPLES = Path(__file__).parents[2] / "examples"
#: A model of another kind, by example, and the pipeline that would have to load it.
MISTAKEN = [
    ("flux_ulysses", "sd3", "FluxPipeline"),
    ("flux_ring", "sd3", "FluxPipeline"),
    ("flux_usp", "sdxl", "FluxPipeline"),
    ("flux_tensor", "sd3", "FluxPipeline"),
    ("flux_pipefusion", "sd3", "FluxPipeline"),
    ("flux_hybrid", "sd3", "FluxPipeline"),
    ("flux_lora_ddp", "sd3", "FluxPipeline"),
    ("sd3_ulysses", "flux", "StableDiffusion3Pipeline"),
    ("sdxl_cfg", "flux", "StableDiffusionXLPipeline"),
    ("parallel_sdxl", "flux", "StableDiffusionXLPipeline"),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models without their weights."""
    root = tmp_path_factory.mktemp("configs")
    for folder in (
        tiny.tiny_models() / "sdxl",
        tiny_flow.tiny_flow_models() / "flux",
        tiny_flow.tiny_flow_models() / "sd3",
    ):
        shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))
    return root


@pytest.fixture(autouse=True)
def theirs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, as in a script of one's own
        yield


def check(model: Path, **plan: int) -> None:
    made = ParallelPlan(**plan)
    made.check(made.world_size, describe(model))


@pytest.mark.parametrize(
    ("kind", "plan", "message"),
    [
        (
            "flux",
            {"ulysses": 3},
            "ulysses=3 does not divide the 4 attention heads of FluxTransformer2DModel: use 1, 2 or 4",
        ),
        (
            "flux",
            {"tensor": 3},
            "tensor=3 does not divide the 4 attention heads of FluxTransformer2DModel: use 1, 2 or 4",
        ),
        (
            "flux",
            {"pipefusion": 7},
            "pipefusion=7 stages need a block each, FluxTransformer2DModel has 6: use pipefusion=6",
        ),
        ("sd3", {"ulysses": 8}, "ulysses=8 does not divide the 4 attention heads of SD3Transformer2DModel"),
        ("sd3", {"ring": 2}, "ring=2: SD3Transformer2DModel is split by our own processors, which know ulysses= only"),
        ("sd3", {"tensor": 2}, "tensor=2: diffusers has no tensor-parallel plan for SD3Transformer2DModel"),
        ("sd3", {"pipefusion": 2}, "pipefusion=2: there is no patch pipeline for SD3Transformer2DModel"),
        ("sdxl", {"ulysses": 2}, "ulysses=2: the sequence of UNet2DConditionModel cannot be split"),
        ("sdxl", {"tensor": 2}, "tensor=2: diffusers has no tensor-parallel plan for UNet2DConditionModel"),
    ],
)
def test_a_model_that_a_plan_does_not_fit(configs: Path, kind: str, plan: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check(configs / kind, **plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"cfg": 3}, "cfg=3: guidance has two branches, use cfg=1 or cfg=2"),
        ({"ulysses": 0}, "ulysses=0 is not a number of ranks"),
        ({"ring": 2.0}, "ring=2.0 is not a number of ranks"),
        ({"tensor": 2, "ulysses": 2}, "tensor=2 and ulysses=2 do not go together"),
        ({"tensor": 2, "ring": 4}, "tensor=2 and ring=4 do not go together"),
        ({"tensor": 2, "pipefusion": 2}, "tensor=2 and pipefusion=2 do not go together"),
        ({"ring": 2, "pipefusion": 2}, "ring=2 and pipefusion=2 do not go together.*ulysses= in place of ring="),
    ],
)
def test_a_plan_that_is_wrong_in_itself(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ParallelPlan(**plan)


def test_a_plan_for_another_number_of_ranks(configs: Path) -> None:
    shape = describe(configs / "flux")
    with pytest.raises(PlanError, match=r"\(ring=2 x ulysses=2\) is for 4 ranks and there are 2: start 4 \(-n 4"):
        ParallelPlan(ulysses=2, ring=2).check(2, shape)
    from drumline.distributed import DistributedWorker

    with pytest.raises(PlanError, match=r"is for 2 ranks and there are 1"):
        join(ParallelPlan(cfg=2), DistributedWorker(0, 1))


def test_guidance_that_runs_branch_after_branch_is_not_split() -> None:
    shape = ModelShape(name="SomeTransformer", heads=4, blocks=4, guidance="separate")
    with pytest.raises(
        PlanError, match="cfg=2 needs both branches of guidance in one forward, and SomeTransformer runs"
    ):
        ParallelPlan(cfg=2).check(2, shape)
    with pytest.raises(PlanError, match="is not known to batch them: use cfg=1"):
        ParallelPlan(cfg=2).check(2, ModelShape(name="SomeTransformer", heads=4, blocks=4))


def test_processors_that_bypass_the_dispatcher_are_refused_though_diffusers_has_a_plan() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Renamed(type(tiny_flow.flux_transformer())):  # type: ignore[misc]
        """A model that we have no processors for."""

    class Bypassing:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return FluxAttnProcessor()(*args, **kwargs)

    with torch.device("meta"):
        model = Renamed(num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=128)
    assert shape_of(model).sequence == "diffusers"
    model.transformer_blocks[0].attn.processor = Bypassing()
    shape = shape_of(model)
    assert shape.bypassing == ("Bypassing",)
    with pytest.raises(
        PlanError, match=r"ulysses=2: the sequence of Renamed cannot be split: .*\(Bypassing\).*wrong images"
    ):
        ParallelPlan(ulysses=2).check(2, shape)


def test_a_folder_without_a_denoiser(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
    with pytest.raises(PlanError, match=r"no denoiser that diffusers .* knows"):
        describe(tmp_path)


def test_what_describe_reads_of_each_model(configs: Path) -> None:
    flux, sd3, sdxl = (describe(configs / name) for name in ("flux", "sd3", "sdxl"))
    assert (flux.heads, flux.blocks, flux.sequence, flux.guidance, flux.pixels_per_token) == (
        4,
        6,
        "diffusers",
        "separate",
        16,
    )
    assert flux.tensor_widths == (64, 256)
    assert (sd3.heads, sd3.blocks, sd3.sequence, sd3.guidance, sd3.pixels_per_token) == (
        4,
        4,
        "drumline",
        "batched",
        16,
    )
    assert sd3.bypassing == ("JointAttnProcessor2_0",)
    assert (sdxl.heads, sdxl.blocks, sdxl.sequence, sdxl.guidance) == (None, 0, None, "batched")


@pytest.mark.parametrize(
    ("example", "kind", "ranks", "setup", "message"),
    [
        ("flux_ulysses", "flux", 3, {}, "ulysses=3 does not divide the 4 attention heads"),
        ("flux_usp", "flux", 3, {}, r"\(ulysses=2\) is for 2 ranks and there are 3"),
        ("flux_usp", "flux", 6, {"ulysses": 3}, "ulysses=3 does not divide the 4 attention heads"),
        ("sd3_ulysses", "sd3", 8, {}, "ulysses=8 does not divide the 4 attention heads"),
        ("flux_tensor", "flux", 3, {}, "tensor=3 does not divide the 4 attention heads"),
        ("sdxl_cfg", "sdxl", 3, {}, r"\(cfg=2\) is for 2 ranks and there are 3"),
        ("flux_pipefusion", "flux", 7, {}, "pipefusion=7 stages need a block each, FluxTransformer2DModel has 6"),
        ("flux_hybrid", "flux", 4, {}, r"\(cfg=2 x pipefusion=2 x ulysses=2\) is for 8 ranks and there are 4"),
        ("flux_pipefusion", "flux", 2, {"patches": 0}, "patches=0: use 1 or more"),
        ("flux_pipefusion", "flux", 2, {"warmup": 0}, "warmup=0: the first step has"),
        ("flux_hybrid", "flux", 12, {"ulysses": 3}, "ulysses=3 does not divide the 4 attention heads"),
        ("flux_hybrid", "flux", 3, {"cfg": 3, "pipefusion": 1, "ulysses": 1}, "cfg=3: guidance has two branches"),
        *((name, kind, 2, {}, f"model: .* has a .*, and {taken} takes a") for name, kind, taken in MISTAKEN),
    ],
)
def test_examples_refuse_before_weights_are_loaded(
    configs: Path,
    load_example: Callable[[str], Any],
    example: str,
    kind: str,
    ranks: int,
    setup: dict[str, int],
    message: str,
) -> None:
    manifest = yaml.safe_load((EXAMPLES / example / "app.yaml").read_text())
    worker = getattr(load_example(example), manifest["spec"]["workerClass"].removeprefix("app:"))(0, ranks)
    worker.device = torch.device("cpu")
    with pytest.raises(PlanError, match=message):
        worker.setup(model=str(configs / kind), **setup)


def test_a_group_of_one_needs_no_process_group() -> None:
    alone = Groups(ParallelPlan())
    assert alone.leads
    assert alone.seed(5) == 5
    assert alone.seed(None) != alone.seed(None)
    assert alone.gather(torch.ones(2)) is not None
    assert all(alone.group(name) is None for name in ("cfg", "data", "ulysses"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"patches": 0}, "patches=0: use 1 or more"), ({"warmup": 0}, "warmup=0: the first step has")],
)
def test_a_sampler_with_wrong_numbers(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FluxSampler(tiny_flow.build_flux(), Groups(ParallelPlan()), **numbers)


def test_a_scheduler_that_adds_noise_at_each_step() -> None:
    pipeline = tiny_flow.build_flux()
    pipeline.scheduler.register_to_config(stochastic_sampling=True)
    with pytest.raises(PlanError, match="stochastic_sampling=True"):
        FluxSampler(pipeline, Groups(ParallelPlan()))


def test_a_sampler_refuses_what_it_would_compute_wrongly() -> None:
    pipeline = tiny_flow.build_flux()
    sampler = FluxSampler(pipeline, Groups(ParallelPlan()))
    pipeline.transformer.transformer_blocks[0].attn.fused_projections = True
    with pytest.raises(PlanError, match="unfuse_qkv_projections"):
        sampler("a cat", width=64, height=64, num_inference_steps=1, max_sequence_length=16)


def test_a_cut_transformer_refuses_the_pipelines_own_loop() -> None:
    pipeline = tiny_flow.build_flux()
    FluxSampler(pipeline, Groups(ParallelPlan()))
    with pytest.raises(PlanError, match=r"holds the blocks of one stage.*draw with the FluxSampler"):
        pipeline("a cat", width=64, height=64, num_inference_steps=1, max_sequence_length=16)


def test_stages_on_a_shared_gpu_are_refused_since_gloo_sends_only_between_cpus() -> None:
    import torch.distributed as dist

    from drumline.errors import ConfigurationError
    from drumline.training import Pipeline, StagePlan

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PlanError, match=r"pipefusion=2: gloo sends nothing from GPU to GPU.*or pipefusion=1"):
            Groups(ParallelPlan(pipefusion=2), 0, "cuda")
        stages = {0: torch.nn.Identity()}
        with pytest.raises(ConfigurationError, match="backend: gloo sends nothing from GPU to GPU"):
            Pipeline(StagePlan(2, 2, "gpipe"), stages, torch.nn.functional.mse_loss, torch.device("cuda"))
    finally:
        dist.destroy_process_group()


def test_a_model_of_real_size_is_described_without_its_memory(configs: Path, tmp_path: Path) -> None:
    import psutil
    from diffusers import FluxTransformer2DModel

    # The class's defaults are FLUX.1's numbers: 24 GB of weights.
    folder = shutil.copytree(configs / "flux", tmp_path / "flux")
    with torch.device("meta"):
        FluxTransformer2DModel(guidance_embeds=True).save_config(folder / "transformer")
    before = psutil.Process().memory_info().rss
    flux = describe(folder)
    assert psutil.Process().memory_info().rss - before < 500e6
    assert (flux.heads, flux.blocks, flux.tensor_widths) == (24, 57, (3072, 12288))
    with pytest.raises(
        PlanError, match=r"ulysses=5 does not divide the 24 attention heads .*: use 1, 2, 3, 4, 6, 8, 12 or 24"
    ):
        ParallelPlan(ulysses=5).check(5, flux)
    ParallelPlan(cfg=2, pipefusion=2, ulysses=2).check(8, flux)
    assert flux.image_tokens(1024, 1024) == 4096
