"""The HTTP floor: FastAPI on uvicorn and nothing else. ``python -m bench.bare_http PORT``."""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Request(BaseModel):
    """In."""

    prompt: str


class Answer(BaseModel):
    """Out."""

    prompt: str


@app.get("/readyz")
async def readyz() -> dict[str, str]:
    """Say that the server is up."""
    return {}


@app.post("/")
async def echo(request: Request) -> Answer:
    """Send the prompt back."""
    return Answer(prompt=request.prompt)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
