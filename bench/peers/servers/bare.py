"""The floor: the work inside FastAPI's own process, on uvicorn. ``python -m bench.peers.servers.bare PORT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from bench.peers.servers.work import Work

app = FastAPI()
work = Work()


@app.post("/")
async def invoke(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    return work.answer(request)


@app.post("/stream")
async def stream(request: dict[str, Any]) -> StreamingResponse:
    """Answer with server-sent events."""

    def events() -> Iterator[str]:
        for update in work.updates(request):
            yield f"data: {json.dumps(update)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
