"""What every server does for one request, and nothing else: imported by all of them, so that only the servers differ.

A request is ``{"kind": ..., "prompt": ..., "count": ..., "interval": ...}``. Needs numpy and Pillow.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

TENSOR_SHAPE = (3, 1024, 1024)  # float32: 12 MiB
PICTURE_SIZE = 1024
QUALITY = 95  # of JPEG: what drumline gives results


class Work:
    """Values that requests ask for, made once like a model's weights."""

    def __init__(self) -> None:
        self.tensor = np.arange(12 << 18, dtype=np.float32).reshape(TENSOR_SHAPE)
        self.picture = picture()

    def value(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the result as Python values: a text, an array of 12 MiB, a picture, a pid, or a text after a while."""
        kind = request.get("kind", "noop")
        if kind == "tensor":
            return {"tensor": self.tensor}
        if kind == "image":
            return {"image": self.picture}
        if kind == "pid":
            return {"pid": os.getpid()}
        if kind == "sleep":
            time.sleep(request["interval"])
        return {"prompt": request.get("prompt", "")}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the result as values that JSON can carry, for servers that leave that to their users."""
        return {name: plain(value) for name, value in self.value(request).items()}

    @staticmethod
    def updates(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield ``count`` updates, ``interval`` seconds apart, with the time (monotonic, ns) at which each was made."""
        interval = request.get("interval", 0.0)
        started = time.monotonic()
        for i in range(request.get("count", 1)):
            if interval:
                time.sleep(max(0.0, started + i * interval - time.monotonic()))  # the pace is the workload
            yield {"sent_ns": time.monotonic_ns()}


def plain(value: Any) -> Any:
    """Return an array or a picture as a data URL: the form that drumline gives them in JSON."""
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value)
        return "data:application/x-npy;base64," + base64.b64encode(file.getvalue()).decode()
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "JPEG", quality=QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return value


def picture(seed: int = 0, size: int = PICTURE_SIZE) -> Image.Image:
    """Return an RGB picture with soft colours and some grain, about as hard to encode as a photograph."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (size // 32, size // 32, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 6, (size, size, 1)).astype(np.int16)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
