"""The example's worker, but its result is what the ranks drew, untouched by 8-bit pixels."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "parallel_sdxl"))

from app import ParallelSDXL


class RawSDXL(ParallelSDXL):
    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        self.gathered = super().gather(tensor)
        return self.gathered

    def __call__(self, streaming: bool = False, **payload: Any) -> dict[str, Any]:
        super().__call__(streaming, **payload)
        return {"images": torch.stack(self.gathered)} if self.gathered else {}
