"""What every strategy's test asks of its worker: streamed like plain, cancelled in lockstep, exact again afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

from drumline.errors import RequestCancelled

if TYPE_CHECKING:
    import torch

    from drumline.distributed import DistributedRunner

TIMEOUT = 120.0  # seconds that one request may take on a busy machine


async def draw(runner: DistributedRunner, **request: Any) -> torch.Tensor:
    """Return ``image`` of the result of ``request``: (N, 3, H, W) in 0..1."""
    image: torch.Tensor = (await runner.invoke(request, timeout=TIMEOUT))["image"]
    return image


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


async def check_stream(runner: DistributedRunner, request: dict[str, Any], *, steps: int, every: int = 5) -> None:
    """Stream ``request``: progress of each step, previews, in order; then the result, bit-equal to the plain one."""
    import torch

    *updates, result = [event async for event in runner.stream(request, timeout=TIMEOUT)]
    kinds = [update["progress"]["done"] if "progress" in update else "preview" for update in updates]
    wanted = [[step + 1, "preview"] if step % every == 0 else [step + 1] for step in range(steps)]
    assert kinds == [kind for each in wanted for kind in each]
    assert all(update["progress"]["total"] == steps for update in updates if "progress" in update)
    previews = [update["image"] for update in updates if "image" in update]
    assert len({preview.tobytes() for preview in previews}) == len(previews) > 1
    plain = await runner.invoke(request, timeout=TIMEOUT)
    assert torch.equal(result["image"], plain["image"])


async def check_cancels(
    runner: DistributedRunner, long: dict[str, Any], short: dict[str, Any], *, steps: int, times: int = 10
) -> None:
    """Cancel ``long`` early, midway and late: all ranks leave at one step, and ``short`` draws what it drew before.

    Args:
        runner: its ranks serve on; none may be restarted.
        long: a request of ``steps`` steps.
        short: another one, with a seed.
        steps: of ``long``.
        times: requests that have to be cancelled midway, at more than one step; at least 2.
    """
    import torch

    expected = await draw(runner, **short)
    ranks = set(range(len(runner.status.ranks)))
    started = time.monotonic()
    await runner.invoke(long, timeout=TIMEOUT)
    full = time.monotonic() - started
    chance = random.Random(20)  # noqa: S311  # moments, not secrets
    stops: list[int] = []
    tries = 0
    while len(stops) < times or len(set(stops)) == 1:
        # Random within one part of the request after the other, so that few cancels do not come all at its end.
        moment = (tries % times + chance.random()) / times
        tries += 1
        assert tries <= 4 * times, f"{len(stops)} requests were cancelled midway, at steps {stops}"
        started = time.monotonic()
        ticket = runner.submit(long, streaming=bool(tries % 2))
        timer = asyncio.get_running_loop().call_later(0.9 * moment * full, ticket.cancel)
        try:
            await ticket.result()
            full = min(full, time.monotonic() - started)  # the cancel came too late: aim earlier
        except RequestCancelled as error:
            if ticket.stopped_steps:  # else: it was cancelled before a rank had seen it
                assert set(ticket.stopped_steps) == ranks
                assert set(ticket.stopped_steps.values()) == {error.step}
                assert error.step is not None
                assert 1 <= error.step <= steps
                stops.append(error.step)
        finally:
            timer.cancel()
        assert torch.equal(await draw(runner, **short), expected), f"after a cancel at step {stops[-1:]}"
    assert runner.status.restarts == 0
