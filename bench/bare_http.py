"""The HTTP floor: FastAPI on uvicorn and nothing else. ``python -m bench.bare_http PORT``."""

import json
import sys
import time
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class Request(BaseModel):
    """In."""

    prompt: str = ""


class Answer(BaseModel):
    """Out."""

    prompt: str


class Sized(BaseModel):
    """A text, in or out."""

    value: str = ""
    size: int = 0


class Count(BaseModel):
    """How many updates to send."""

    count: int = 1


@app.get("/readyz")
async def readyz() -> dict[str, str]:
    """Say that the server is up."""
    return {}


@app.post("/")
async def echo(request: Request) -> Answer:
    """Send the prompt back."""
    return Answer(prompt=request.prompt)


@app.post("/value")
async def value(request: Sized) -> Sized:
    """Send back a text of the size that was asked for."""
    return Sized(value="x" * request.size)


@app.post("/stream")
async def stream(request: Count) -> StreamingResponse:
    """Send updates with the time at which they were sent, as an event stream."""

    async def events() -> AsyncIterator[bytes]:
        for i in range(request.count):
            data = json.dumps({"sent_ns": time.monotonic_ns()})
            yield f"event: update\nid: {i}\ndata: {data}\n\n".encode()
        yield f"event: result\nid: {request.count}\ndata: {{}}\n\n".encode()

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
