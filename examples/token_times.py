"""Draw when each token of examples/llm_tensor arrives, on one rank and on two: the tiny model, CPU ranks.

python examples/token_times.py        # writes examples/llm_tensor/tokens.svg
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from loss_curve import Curve, plot

from drumline.distributed import DistributedRunner

EXAMPLE = Path(__file__).parent / "llm_tensor"
TOKENS = 64


async def arrivals(world_size: int) -> Curve:
    """Return (token, milliseconds since the request) of the second request: the first one warms up."""
    runner = DistributedRunner(f"{EXAMPLE / 'app.py'}:Generate", world_size=world_size, device="cpu")
    await runner.start(model="tiny")
    try:
        request = {"prompt": "The lighthouse", "max_tokens": TOKENS}
        await runner.invoke(request)
        curve: Curve = []
        started = time.perf_counter()
        async for update in runner.stream(request):
            if "finish" not in update:
                curve.append((update["tokens"], (time.perf_counter() - started) * 1e3))
        return curve
    finally:
        await runner.stop()


async def main() -> None:
    """Draw both."""
    curves = [await arrivals(1), await arrivals(2)]
    title = "llm_tensor: milliseconds until each token arrives; one rank (blue) and two (orange), tiny model on CPU"
    (EXAMPLE / "tokens.svg").write_text(plot(curves, title))


if __name__ == "__main__":
    asyncio.run(main())
