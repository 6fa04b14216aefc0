"""The worker of the server's tests: a typed signature, steps, updates, failures, and results of any kind and size."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Field

from drumline.testing.workers import fail
from drumline.worker import DistributedWorker


class Served(DistributedWorker):
    """Does what the payload says."""

    def setup(self, fail_rank: int | None = None) -> None:
        """Fail on ``fail_rank``."""
        if fail_rank == self.rank:
            fail("raise")

    def __call__(
        self,
        prompt: str,
        count: Annotated[int, Field(ge=1, le=4)] = 1,
        mode: Literal["echo", "nan", "image", "large"] = "echo",
        steps: int = 0,
        seconds: float = 0.0,
        update_bytes: int = 0,
        result_bytes: int = 0,
        how: str = "",
        rank: int = 0,
        streaming: bool = False,
    ) -> dict[str, Any]:
        """Take ``steps`` steps of ``seconds`` with an update each, fail as ``how`` says, return as ``mode`` says.

        Args:
            streaming: sends the updates.
            prompt: comes back in the result.
            count: comes back in the result.
            mode: kind of the result.
            steps: how many, with a checkpoint before each.
            seconds: length of one step.
            update_bytes: size of each update.
            result_bytes: size of a large result.
            how: see ``drumline.testing.workers.fail``; empty: no failure.
            rank: which rank fails.
        """
        for step in range(steps):
            self.checkpoint()
            if seconds:
                time.sleep(seconds)
            if streaming and self.rank == 0:
                self.add_streaming_result({"step": step, "padding": "." * update_bytes})
        if how and rank == self.rank:
            fail(how)
        return {"prompt": prompt, "count": count, "streaming": streaming, **_extra(mode, result_bytes)}


def _extra(mode: str, size: int) -> dict[str, Any]:
    if mode == "nan":
        return {"value": [1.0, float("nan")]}
    if mode == "image":
        from PIL import Image

        return {"image": Image.new("RGB", (8, 6), (200, 30, 30))}
    return {"text": "." * size} if mode == "large" else {}
