"""What answers the operator in place of the runners in pods that only exist in the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

#: As long as a runner waits for news.
_LONG = 30.0
_BODY = {"state": "ready", "worldSize": 1, "readyRanks": 1, "restarts": 0, "lastFailure": None, "queueDepth": 0}


@asynccontextmanager
async def serving(address: str, port: int) -> AsyncIterator[None]:
    """Answer ``/readyz`` and ``/status`` there as a runner whose ranks are ready, and that never has news."""

    async def answer(request: web.Request) -> web.Response:
        if request.query.get("since") == "1":
            await asyncio.sleep(_LONG)
        return web.json_response({**_BODY, "ranks": [], "version": 1})

    app = web.Application()
    app.add_routes([web.get("/readyz", answer), web.get("/status", answer)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port, backlog=1024).start()
        yield
    finally:
        await runner.cleanup()
