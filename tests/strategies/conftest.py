"""What the tests of strategies share: the environment of ranks, and plain diffusers in one process to compare with."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One thread per rank, and for what it is compared with: sums of floats depend on how they are split."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()
    torch.set_num_threads(threads)


async def start_examples(ranks: int, **options: Any) -> DistributedRunner:
    runner = DistributedRunner(f"{HERE / 'raw_examples.py'}:Examples", world_size=ranks, device="cpu", **options)
    await runner.start(timeout=250)
    return runner


@pytest_asyncio.fixture(loop_scope="session")
async def start(one_thread: None) -> AsyncIterator[Callable[..., Any]]:
    """`start(ranks, **options)`: ranks for one test alone, which may break them."""
    runners: list[DistributedRunner] = []

    async def start_one(ranks: int, **options: Any) -> DistributedRunner:
        runners.append(await start_examples(ranks, **options))
        return runners[-1]

    yield start_one
    for runner in runners:
        await runner.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two(one_thread: None) -> AsyncIterator[DistributedRunner]:
    """Two warm ranks that run any example: `raw_examples.py`."""
    runner = await start_examples(2)
    yield runner
    await runner.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def four(one_thread: None) -> AsyncIterator[DistributedRunner]:
    """Four of them."""
    runner = await start_examples(4)
    yield runner
    await runner.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def eight(one_thread: None) -> AsyncIterator[DistributedRunner]:
    """Eight of them, for what needs as many."""
    runner = await start_examples(8)
    yield runner
    await runner.stop()


@pytest.fixture(scope="session")
def one_process(one_thread: None) -> Callable[..., Any]:
    """`one_process(kind, seed=..., **request)`: what plain diffusers draws, nothing of drumline but the tiny model."""
    import diffusers
    import torch

    from drumline.testing import tiny, tiny_flow

    classes = {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline", "sdxl": "StableDiffusionXLPipeline"}
    pipelines: dict[str, Any] = {}

    def draw(kind: str, *, seed: int, **request: Any) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, as in a script of one's own
            if kind not in pipelines:
                folder = tiny.tiny_models() if kind == "sdxl" else tiny_flow.tiny_flow_models()
                pipelines[kind] = getattr(diffusers, classes[kind]).from_pretrained(folder / kind)
                pipelines[kind].set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(seed)
            images: torch.Tensor = pipelines[kind](**{"output_type": "pt", **request}, generator=generator).images
        return images

    return draw


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], Any]:
    """`load_example(name)`: the module `examples/NAME/app.py`, in this process."""

    def load(name: str) -> Any:
        module = f"drumline_example_{name}"
        if module not in sys.modules:
            path = HERE.parents[1] / "examples" / name / "app.py"
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        return sys.modules[module]

    return load
