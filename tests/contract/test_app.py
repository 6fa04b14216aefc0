"""Apps behind the real server: endpoints, requests, errors, hints, life. Runners in Apps: tests/process."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx2
import pytest
from fastapi import Header, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

import drumline
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, InvalidPayload, QueueFull
from drumline.host import service_of_app
from drumline.server.serve import Ended, serve
from drumline.toolkit import File, Image

SETTINGS = RunnerSettings(port=0, namespace="acme", name="demo", drain_delay=0, drain_timeout=5)


class Order(BaseModel):
    prompt: str
    steps: int = Field(default=20, ge=1)
    image: Image | None = None


class Reply(BaseModel):
    text: str
    file: File | None = None


class Demo(drumline.App):
    """What this app is for."""

    def setup(self) -> None:
        self.events = ["setup"]
        self.thread = threading.get_ident()

    def teardown(self) -> None:
        self.events.append("teardown")

    def handle_exit(self) -> None:
        self.events.append("exit")

    def provide_hints(self) -> list[str]:
        return ["sdxl", *self.events]

    @drumline.endpoint("/")
    async def run(self, order: Order, response: Response) -> Reply:
        response.headers["X-Steps"] = str(order.steps)
        return Reply(text=order.prompt, file=order.image)

    @drumline.endpoint("/stream")
    async def stream(self, order: Order) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for step in range(order.steps):
                yield f'data: {{"step": {step}}}\n\n'

        return StreamingResponse(lines(), media_type="text/event-stream")

    @drumline.endpoint("/sync")
    def sync(self, order: Order) -> dict:
        assert threading.current_thread() is not threading.main_thread()
        return {"prompt": order.prompt, "request_id": self.current_request.request_id}

    @drumline.endpoint("/who")
    async def who(self, request: Request, x_fal_request_id: Annotated[str, Header()] = "") -> dict:
        info = self.current_request
        return {
            "request_id": info.request_id,
            "headers": dict(info.headers),
            "path": request.url.path,
            "header": x_fal_request_id,
        }

    @drumline.endpoint("/plain")
    async def plain(self) -> PlainTextResponse:
        return PlainTextResponse("plain", status_code=201)

    @drumline.endpoint("/fail/{how}")
    async def fail(self, how: str) -> None:
        raise {
            "value": ValueError("a secret detail"),
            "payload": InvalidPayload(
                "prompt: too rude", detail=[{"loc": ["body", "prompt"], "msg": "m", "type": "t"}]
            ),
            "full": QueueFull("no room", depth=3, retry_after=7),
        }[how]


class Serving:
    """A service that is up, and how it ended."""

    def __init__(self) -> None:
        self.url = ""
        self.stop = asyncio.Event()
        self.ended: Ended | None = None


@asynccontextmanager
async def served(cls: type[drumline.App], **changes) -> AsyncIterator[tuple[httpx2.AsyncClient, Serving]]:
    settings = SETTINGS.model_copy(update=changes)
    serving, bound, ready = Serving(), asyncio.Event(), asyncio.Event()

    def on_bound(url: str) -> None:
        serving.url = url
        bound.set()

    task = asyncio.create_task(
        serve(
            service_of_app(cls, settings),
            on_bound=on_bound,
            on_ready=ready.set,
            stop=serving.stop,
            handle_signals=False,
        )
    )
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        async with httpx2.AsyncClient(base_url=serving.url or "http://none", timeout=20) as client:
            yield client, serving
    finally:
        serving.stop.set()
        serving.ended = await task


async def test_endpoints():
    async with served(Demo) as (client, _):
        png = Image.from_bytes(b"x", "png").url
        answer = await client.post("/", json={"prompt": "cat", "image": png})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == "cat"
        assert answer.json()["file"]["url"] == png
        assert answer.headers["x-steps"] == "20"
        assert (await client.post("/sync", json={"prompt": "a"}, headers={"X-Request-Id": "mine"})).json() == {
            "prompt": "a",
            "request_id": "mine",
        }
        plain = await client.post("/plain")
        assert (plain.status_code, plain.text) == (201, "plain")


async def test_only_post():
    async with served(Demo) as (client, _):
        assert (await client.get("/")).status_code == 405
        assert (await client.post("/nowhere")).status_code == 404


@pytest.mark.parametrize("prefix", ["", "/acme/demo"])
async def test_under_the_apps_id(prefix):
    async with served(Demo) as (client, _):
        assert (await client.post(prefix or "/", json={"prompt": "cat"})).json()["text"] == "cat"
        assert (await client.post(f"{prefix}/sync", json={"prompt": "cat"})).json()["prompt"] == "cat"
        text = (await client.post(f"{prefix}/stream", json={"prompt": "cat", "steps": 2})).text
        assert text == 'data: {"step": 0}\n\ndata: {"step": 1}\n\n'


async def test_the_current_request():
    async with served(Demo) as (client, _):
        one, two = await asyncio.gather(
            client.post("/who", headers={"X-Request-Id": "one", "X-Fal-Request-Id": "fal", "Authorization": "Key k"}),
            client.post("/who", headers={"X-Request-Id": "two"}),
        )
        assert (one.json()["request_id"], two.json()["request_id"]) == ("one", "two")
        assert one.headers["x-request-id"] == "one"
        assert one.json()["header"] == "fal"
        assert "authorization" not in one.json()["headers"]


async def test_hints():
    async with served(Demo) as (client, _):
        answer = await client.post("/", json={"prompt": "cat"})
        assert answer.headers["x-fal-runner-hints"] == answer.headers["x-drumline-hints"] == "sdxl,setup"
        stream = await client.post("/stream", json={"prompt": "cat"})
        assert stream.headers["x-drumline-hints"] == "sdxl,setup"
        assert "x-drumline-hints" not in (await client.get("/status")).headers


async def test_errors_are_problems():
    async with served(Demo) as (client, _):
        wrong = await client.post("/", json={"steps": 0})
        assert (wrong.status_code, wrong.headers["content-type"]) == (422, "application/problem+json")
        assert [d["loc"] for d in wrong.json()["detail"]] == [["body", "prompt"], ["body", "steps"]]
        secret = await client.post("/fail/value")
        assert secret.status_code == 500
        assert "Traceback" not in secret.text
        payload = await client.post("/fail/payload")
        assert (payload.status_code, payload.json()["detail"][0]["loc"]) == (422, ["body", "prompt"])
        full = await client.post("/fail/full")
        assert (full.status_code, full.headers["retry-after"]) == (429, "7")
        assert (await client.post("/", content=b"{", headers={"content-type": "application/json"})).status_code in {
            400,
            422,
        }


async def test_the_openapi_document():
    async with served(Demo) as (client, _):
        document = (await client.get("/openapi.json")).json()
    assert document["info"]["description"] == "What this app is for."
    assert {"/", "/stream", "/sync", "/who", "/plain", "/fail/{how}"} <= set(document["paths"])
    assert set(document["paths"]["/"]) == {"post"}
    body = document["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Order"}
    order = document["components"]["schemas"]["Order"]
    assert order["required"] == ["prompt"]
    assert order["properties"]["steps"] == {"type": "integer", "minimum": 1, "title": "Steps", "default": 20}
    answer = document["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Reply"}


async def test_the_order_of_an_end():
    kept = []

    class Kept(Demo):
        def setup(self) -> None:
            super().setup()
            kept.append(self)

    async with served(Kept) as (_, serving):
        pass
    assert serving.ended == Ended()
    assert kept[0].events == ["setup", "exit", "teardown"]


async def test_a_setup_that_fails():
    class Failing(Demo):
        async def setup(self) -> None:
            self.events = []
            raise ValueError("no such model")

    async with served(Failing) as (_, serving):
        pass
    assert isinstance(serving.ended.error, ValueError)


async def test_calls_while_setup_runs():
    go = asyncio.Event()

    class Slow(Demo):
        async def setup(self) -> None:
            self.events = []
            await go.wait()

    bound, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
    task = asyncio.create_task(
        serve(service_of_app(Slow, SETTINGS), on_bound=bound.set_result, stop=stop, handle_signals=False)
    )
    try:
        async with httpx2.AsyncClient(base_url=await bound, timeout=20) as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            early = await client.post("/", json={"prompt": "cat"})
            assert early.status_code == 503
            assert "retry-after" in early.headers
            version = (await client.get("/status")).json()["version"]
            go.set()
            assert (await client.get("/readyz", params={"since": version})).status_code == 200
            assert (await client.post("/", json={"prompt": "cat"})).status_code == 200
    finally:
        stop.set()
        await task


def test_an_endpoint_that_cannot_be_served():
    class Wrong(drumline.App):
        @drumline.endpoint("/")
        def run(self) -> threading.Event: ...

    with pytest.raises(ConfigurationError, match=r"Wrong\.run: Invalid args for response field"):
        service_of_app(Wrong, SETTINGS)


def test_settings_that_do_not_fit_an_app():
    with pytest.raises(ConfigurationError, match="setup arguments \\(model\\) are for workers"):
        service_of_app(Demo, SETTINGS.model_copy(update={"setup_args": {"model": "x"}}))


async def test_the_number_of_gpus_that_was_asked_for():
    class Wanting(drumline.App, num_gpus=2):
        @drumline.endpoint("/")
        def run(self) -> int:
            return self.num_gpus

    async with served(Wanting) as (client, _):
        assert (await client.post("/")).json() == 2
    async with served(Wanting, world_size=4) as (client, _):
        assert (await client.post("/")).json() == 4
    assert Wanting.num_gpus == 2
