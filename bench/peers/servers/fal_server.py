"""fal.distributed behind FastAPI, as its tutorial sets it up. ``... fal_server PORT``.

It knows CUDA and NCCL only. Inside the ranks, and nowhere else, ``init_process_group`` is given gloo and the device is the
CPU; all else is the package as it comes.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import torch.distributed as dist
import uvicorn
from fal.distributed import DistributedRunner, DistributedWorker
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from bench.peers.servers.work import Work, plain

RANKS = 2


class Worker(DistributedWorker):
    """The work on every rank; rank 0's result is the answer."""

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def setup(self, **_: Any) -> None:
        """Make the values."""
        self.work = Work()

    def __call__(self, streaming: bool = False, **request: Any) -> dict[str, Any]:
        """Answer one request."""
        if streaming:
            for update in self.work.updates(request):
                if self.rank == 0:
                    self.add_streaming_result(update, as_text_event=True)
            return {"over": True}
        return self.work.value(request)


class Runner(DistributedRunner):
    """The package's runner, whose ranks run on CPUs."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled in a rank, before anything of the package runs there.
        self.__dict__.update(state)
        init = dist.init_process_group

        def with_gloo(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            return init(*args, **{**kwargs, "backend": "gloo"})

        dist.init_process_group = with_gloo
        torch.cuda.set_device = lambda *_: None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the runner while the server runs."""
    app.state.runner = Runner(Worker, RANKS)
    await app.state.runner.start()
    yield
    await app.state.runner.stop()


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def invoke(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    result = await app.state.runner.invoke(request)
    return {name: plain(value) for name, value in result.items()}


@app.post("/stream")
async def stream(request: dict[str, Any]) -> StreamingResponse:
    """Answer with server-sent events."""
    return StreamingResponse(app.state.runner.stream(request, as_text_events=True), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
