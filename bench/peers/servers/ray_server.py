"""Ray Serve: a deployment in front of a group of two actors that all get each request. ``... ray_server PORT``.

Settings as its performance guide advises: throughput mode, JSON with orjson, no access log.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from bench.peers.servers.work import Work

RANKS = 2


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Rank:
    """One member of the group."""

    def __init__(self) -> None:
        self.work = Work()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        return self.work.answer(request)

    def updates(self, request: dict[str, Any]) -> Any:
        """Yield the updates."""
        yield from self.work.updates(request)


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Group:
    """Gives each request to all ranks; the first one's answer counts."""

    def __init__(self) -> None:
        self.ranks = [Rank.remote() for _ in range(RANKS)]
        ray.get([rank.answer.remote({}) for rank in self.ranks])
        self.turn = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request; one at a time, as ranks that talk to each other need it."""
        body = await request.json()
        if request.url.path == "/stream":
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        async with self.turn:
            answers = await asyncio.gather(*(rank.answer.remote(body) for rank in self.ranks))
        return JSONResponse(answers[0])

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Frame the updates of the first rank."""
        async with self.turn:
            async for update in self.ranks[0].updates.options(num_returns="streaming").remote(body):
                yield f"data: {json.dumps(await update)}\n\n"


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"log_level": "ERROR"})
    serve.run(Group.bind(), logging_config={"log_level": "ERROR", "enable_access_log": False})
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray.shutdown()
