"""A phase of its own: the restart budget is used up, the group says so everywhere, and a new server comes."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import psutil

from chaos.schedule import Fault
from chaos.supervisor import Pod

MAX_RESTARTS = 2


async def use_up(pod: Pod, wrongs: list[str], fault: Fault) -> None:
    """Kill a rank of a ready pod more often than its budget of :data:`MAX_RESTARTS` allows."""
    lives = pod.lives
    for number in range(MAX_RESTARTS + 1):
        status = await pod.ready()
        if status["restarts"] != number:
            wrongs.append(f"{status['restarts']} restarts told after {number}")
        if number == MAX_RESTARTS:
            pod.dying = True
            watching = asyncio.create_task(_last_words(pod, status["version"]))
        psutil.Process(status["ranks"][fault.rank]["pid"]).send_signal(signal.SIGKILL)
        if number < MAX_RESTARTS:
            await _changed(pod, status)
    last = await watching
    await pod.another(lives)
    for place, said in last.items():
        if said is None:
            wrongs.append(f"budget: {place} did not answer when it was used up")
        elif said["state"] != "failed" or said["lastFailure"] is None or not _names(said["lastFailure"], fault.rank):
            wrongs.append(f"budget: {place} says {said}")
    if pod.ends[-1] != 1:
        wrongs.append(f"budget: exit code {pod.ends[-1]}")
    if not _names(pod.said, fault.rank):
        wrongs.append(f"budget: the termination log says {pod.said}")
    await pod.ready()
    pod.dying = False


def _names(failure: dict[str, Any], rank: int) -> bool:
    return failure.get("rank") == rank and failure.get("signal") == signal.SIGKILL


async def _changed(pod: Pod, status: dict[str, Any]) -> None:
    before, now = status["restarts"], status
    while now["restarts"] == before:
        now = await pod.status(now["version"]) or now


async def _last_words(pod: Pod, version: int) -> dict[str, dict[str, Any] | None]:
    """Return what ``/status`` and ``/readyz`` say last before the server ends."""
    places = ("/status", "/readyz")
    return dict(zip(places, await asyncio.gather(*(_last_of(pod, version, place) for place in places)), strict=True))


async def _last_of(pod: Pod, version: int, path: str) -> dict[str, Any] | None:
    last: dict[str, Any] | None = None
    while (status := await pod.status(version, path)) is not None:
        last, version = status, status["version"]
        if status["state"] == "failed":
            break
    return last
