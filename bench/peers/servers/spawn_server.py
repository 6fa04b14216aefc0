"""What a good engineer writes in an afternoon: FastAPI, two processes, a pipe to each. ``... spawn_server PORT``.

A thread per rank waits on its pipe, so that the event loop does not block. When a rank dies, everything is started anew.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from bench.peers.servers.work import Work

RANKS = 2


def rank_main(pipe: Connection) -> None:
    """Serve one pipe until it is closed."""
    work = Work()
    pipe.send("ready")
    while True:
        try:
            streaming, request = pipe.recv()
        except EOFError:
            return
        if streaming:
            for update in work.updates(request):
                pipe.send(update)
            pipe.send(None)
        else:
            pipe.send(work.answer(request))


class Group:
    """Two processes that get every request; one request at a time."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.threads = ThreadPoolExecutor(RANKS)
        self.start()

    def start(self) -> None:
        """Start the processes and wait for them."""
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(RANKS)]
        self.processes = [context.Process(target=rank_main, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()
        self.pipes = [ours for ours, _ in pairs]
        for pipe in self.pipes:
            pipe.recv()

    def restart(self) -> None:
        """Replace the processes."""
        for process in self.processes:
            process.kill()
        self.start()

    async def receive(self, rank: int) -> Any:
        """Return a rank's next message."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, self.pipes[rank].recv)
        except (EOFError, OSError):
            await asyncio.to_thread(self.restart)
            raise HTTPException(503, "a rank is gone") from None

    def send(self, message: Any) -> None:
        """Send to all ranks."""
        for pipe in self.pipes:
            pipe.send(message)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the group while the server runs."""
    app.state.group = Group()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def invoke(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    group: Group = app.state.group
    async with group.turn:
        group.send((False, request))
        answers = await asyncio.gather(*(group.receive(rank) for rank in range(RANKS)))
    answer: dict[str, Any] = answers[0]
    return answer


@app.post("/stream")
async def stream(request: dict[str, Any]) -> StreamingResponse:
    """Answer with server-sent events."""
    group: Group = app.state.group

    async def events() -> AsyncIterator[str]:
        async with group.turn:
            group.send((True, request))
            while (update := await group.receive(0)) is not None:
                yield f"data: {json.dumps(update)}\n\n"
            while await group.receive(1) is not None:
                pass

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
