"""All examples behind one worker, so that they share warm ranks; results are tensors, untouched by 8-bit pixels."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from drumline.distributed import DistributedWorker

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKERS = {
    "flux_hybrid": "FluxHybrid",
    "flux_pipefusion": "FluxPipeFusion",
    "flux_ring": "FluxRing",
    "flux_tensor": "FluxTensor",
    "flux_ulysses": "FluxUlysses",
    "flux_usp": "FluxUsp",
    "sd3_ulysses": "Sd3Ulysses",
    "sdxl_cfg": "SdxlCfg",
}


def load(example: str) -> Any:
    """Import an example's `app.py` under a name of its own: they are all called `app`."""
    name = f"drumline_example_{example}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / example / "app.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


RAW = {
    example: type(name, (getattr(load(example), name),), {"picture": staticmethod(lambda images: images)})
    for example, name in WORKERS.items()
}


class RawSDXL(load("parallel_sdxl").ParallelSDXL):  # type: ignore[misc]
    """This one makes its picture of what it has gathered."""

    def gather(self, tensor: Any) -> Any:
        self.gathered = super().gather(tensor)
        return self.gathered

    def __call__(self, streaming: bool = False, **payload: Any) -> dict[str, Any]:
        super().__call__(streaming, **payload)
        return {"image": torch.stack(self.gathered)} if self.gathered else {}


RAW["parallel_sdxl"] = RawSDXL


def traps(rank: int, world_size: int) -> Any:
    """Import `traps.py`, which lies beside this file."""
    spec = importlib.util.spec_from_file_location("drumline_traps", Path(__file__).with_name("traps.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Traps(rank, world_size)


class Examples(DistributedWorker):
    """Passes each request on to an example's own worker, which is set up when it is first asked for."""

    def setup(self) -> None:
        self.workers: dict[str, DistributedWorker] = {}

    def __call__(
        self, streaming: bool = False, *, example: str, setup: dict[str, Any] | None = None, **payload: Any
    ) -> Any:
        key = example + json.dumps(setup)
        if key not in self.workers:
            make = traps if example == "traps" else RAW[example]
            worker = make(self.rank, self.world_size)
            worker.device = self.device
            worker.setup(**{"model": "tiny", **(setup or {})})
            self.workers[key] = worker
        worker = self.workers[key]
        worker._services, worker.request = self._services, self.request
        return worker(streaming, **payload)
