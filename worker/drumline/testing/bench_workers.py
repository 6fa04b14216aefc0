"""Workers that the benches measure: each does as little as possible, so that what is left is drumline's own cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from drumline.distributed import DistributedWorker

if TYPE_CHECKING:
    from PIL.Image import Image

TENSOR_SHAPE = (3, 1024, 1024)  # float32: 12 MiB
PREVIEW_SIZE = 1024


class Echo(DistributedWorker):
    """Returns the prompt."""

    def __call__(self, streaming: bool = False, *, prompt: str = "") -> dict[str, Any]:
        """Return ``{"prompt": prompt}``."""
        return {"prompt": prompt}


class Streams(DistributedWorker):
    """Sends updates that carry the time at which they were sent."""

    def __call__(self, streaming: bool = False, *, count: int = 1, interval: float = 0.0) -> dict[str, Any]:
        """Send ``count`` updates ``{"sent_ns": monotonic clock}`` from rank 0, ``interval`` seconds apart."""
        if self.rank == 0:
            started = time.monotonic()
            for i in range(count):
                if interval:  # a sleep of 0 would give the core away
                    time.sleep(max(0.0, started + i * interval - time.monotonic()))  # the pace is the workload
                self.add_streaming_result({"sent_ns": time.monotonic_ns()})
        return {"count": count}


class Tensors(DistributedWorker):
    """Returns a tensor of 12 MiB that it made during ``setup()``."""

    def setup(self) -> None:
        """Make the tensor."""
        import torch

        self.tensor = torch.arange(12 << 18, dtype=torch.float32).reshape(TENSOR_SHAPE)

    def __call__(self, streaming: bool = False) -> dict[str, Any]:
        """Return ``{"image": tensor}``."""
        return {"image": self.tensor}


class Previews(DistributedWorker):
    """Streams pictures that it made during ``setup()``."""

    def setup(self) -> None:
        """Make the pictures."""
        self.pictures = [picture(i) for i in range(4)]

    def __call__(self, streaming: bool = False, *, count: int = 1) -> dict[str, Any]:
        """Send ``count`` updates ``{"image": picture}`` from rank 0."""
        if self.rank == 0:
            for i in range(count):
                self.add_streaming_result({"image": self.pictures[i % len(self.pictures)]})
        return {"count": count}


class Values(DistributedWorker):
    """Takes and returns values of any kind and size."""

    def setup(self) -> None:
        """Have nothing yet."""
        self._made: tuple[str, int, Any] = ("", 0, None)

    def __call__(
        self, streaming: bool = False, *, value: Any = None, kind: str = "none", size: int = 0
    ) -> dict[str, Any]:
        """Return ``{"value": v}``: of ``size`` bytes and of ``kind`` (see :func:`value_of`), made when first asked for."""
        if self._made[:2] != (kind, size):
            self._made = (kind, size, value_of(kind, size))
        return {"value": self._made[2]}


class Paced(DistributedWorker):
    """Takes a given time for each request, without using a core: what a GPU's work looks like to the server."""

    def __call__(self, streaming: bool = False, *, seconds: float = 0.002) -> dict[str, Any]:
        """Return ``{}`` after ``seconds``."""
        time.sleep(seconds)  # the workload
        return {}


def value_of(kind: str, size: int) -> Any:
    """Return a value of ``size`` bytes.

    Args:
        kind: ``text``, ``array`` (uint8), ``tensor`` (uint8), ``image`` (RGB, about square), ``none``.
        size: bytes; of an image, of its pixels.
    """
    if kind == "text":
        return "x" * size
    if kind == "array":
        import numpy as np

        return np.arange(size, dtype=np.uint64).astype(np.uint8)
    if kind == "tensor":
        import torch

        return torch.arange(size).to(torch.uint8)
    if kind == "image":
        side = max(1, round((size / 3) ** 0.5))
        return picture(0).resize((side, side))
    return None


def picture(seed: int, size: int = PREVIEW_SIZE) -> Image:
    """Return an RGB picture with soft colours and some grain, about as hard to encode as a photograph."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (size // 32, size // 32, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 6, (size, size, 1)).astype(np.int16)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
