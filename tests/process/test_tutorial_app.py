"""An app written for fal, with another package name, models and dtype: by ``python``, by ``drumline run``, by fal's client."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import httpx2
import pytest
import trustme
from PIL import Image

from drumline.testing.tiny import tiny_models

#: Its warm-up draws 1024 x 1024 pixels in 20 steps, on a laptop's CPU.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DATA = Path(__file__).parents[1] / "data"
READY_SECONDS = 400
REQUEST = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 6}
#: Previews of steps 0 and 5, then the result.
EVENTS = ["update", "update", "result"]


class Process:
    """A server as a process: its log lines (JSON), and its end."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self._queue: Queue[str | None] = Queue()
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DRUMLINE_LOG_FORMAT": "json"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def wait_ready(self) -> str:
        """Return the URL once all ranks are up and the app has warmed up."""
        while True:
            try:
                text = self._queue.get(timeout=READY_SECONDS)
            except Empty:
                pytest.fail(f"not ready; so far: {self.lines}")
            if text is None:
                pytest.fail(f"it ended: {self.lines}")
            self._add(text)
            if "url" in self.lines[-1] and self.lines[-1].get("ranks") == 2:
                return str(self.lines[-1]["url"])

    def _add(self, text: str) -> None:
        try:
            self.lines.append(json.loads(text))
        except ValueError:
            self.lines.append({"message": text})

    def stop(self) -> int:
        """Ask it to stop, as a container's end does, and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()
            with contextlib.suppress(Empty):
                while (text := self._queue.get_nowait()) is not None:
                    self._add(text)

    def messages(self, logger: str) -> list[str]:
        return [line["message"] for line in self.lines if line.get("logger") == logger]


@contextlib.contextmanager
def process(command: list[str], folder: Path, **environment: str) -> Iterator[Process]:
    made = Process(command, folder, **environment)
    code: int | None = None
    try:
        yield made
    finally:
        code = made.stop()
    assert code == 0, made.lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the app's file."""
    models = tiny_models()
    text = (DATA / "parallel_sdxl_tutorial.py").read_text()
    made = tmp_path_factory.mktemp("tutorial")
    (made / "parallel_sdxl.py").write_text(
        text.replace("@SDXL@", str(models / "sdxl")).replace("@TAESD@", str(models / "taesd"))
    )
    return made


def picture(url: str) -> tuple[str, tuple[int, int]]:
    """Format and size of an image in a data URL; two ranks, one above the other, with torchvision's margin."""
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2], validate=True)))
    image.load()
    assert image.convert("L").getextrema() not in {(0, 0), (255, 255)}
    return str(image.format), image.size


GRID = (64 + 2 * 2, 2 * 64 + 3 * 2)


def check(client: httpx2.Client, prefix: str = "") -> None:
    answer = client.post(prefix or "/", json=REQUEST)
    assert answer.status_code == 200, answer.text
    file = answer.json()["image"]
    assert file["content_type"] == "image/png"
    assert picture(file["url"]) == ("PNG", GRID)
    assert file["file_size"] > 0
    stream = client.post(f"{prefix}/stream", json=REQUEST)
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in block.splitlines())
        for block in stream.text.split("\n\n")
        if block and not block.startswith(":")
    ]
    assert [event["event"] for event in events] == EVENTS
    for event in events:
        image = json.loads(event["data"])["image"]
        assert image["content_type"] == "image/jpeg"
        assert (image["width"], image["height"]) == GRID
        assert picture(image["url"]) == ("JPEG", GRID)
    wrong = client.post(prefix or "/", json={"width": "wide"})
    assert wrong.status_code == 422
    assert {d["loc"][-1] for d in wrong.json()["detail"]} == {"prompt", "width"}


def test_by_python(folder: Path) -> None:
    with process([sys.executable, "parallel_sdxl.py"], folder, DRUMLINE_PORT="0") as app:
        url = app.wait_ready()
        with httpx2.Client(base_url=url, timeout=60) as client:
            check(client)
            document = client.get("/openapi.json").json()
            status = client.get("/status").json()
    assert {"/", "/stream"} <= set(document["paths"])
    assert document["components"]["schemas"]["ExampleRequest"]["required"] == ["prompt"]
    assert [rank["state"] for rank in status["ranks"]] == ["ready", "ready"]
    (warning,) = [text for text in app.messages("drumline.app") if "other packages" in text]
    for words in ("diffusers==0.30.3 (installed: ", "torch==2.6.0+cu124 (installed: ", "opencv-python"):
        assert words in warning
    assert "fal" not in warning
    assert "extra-index" not in warning


def test_by_drumline_run_and_fals_client(folder: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    with (tmp_path / "cert.pem").open("wb") as file:
        for part in certificate.cert_chain_pems:
            file.write(part.bytes())
    command = [
        sys.executable, "-m", "drumline", "run", "parallel_sdxl.py", "--host", "localhost", "--port", "0",
        "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"), "--api-key", "a-key",
    ]  # fmt: skip
    with process(command, folder) as app:
        url = app.wait_ready()
        assert url.startswith("https://localhost:")
        trust = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with httpx2.Client(base_url=url, timeout=60, verify=trust) as client:
            assert client.post("/", json=REQUEST).status_code == 401
            client.headers["Authorization"] = "Key a-key"
            check(client, "/acme/sdxl")
        calls = subprocess.run(
            [sys.executable, str(DATA / "fal_client_calls.py"), "acme/sdxl"],
            env=os.environ
            | {
                "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
                "FAL_RUN_HOST": url.removeprefix("https://"),
                "FAL_KEY": "a-key",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert calls.returncode == 0, calls.stderr
    found = json.loads(calls.stdout)
    for way in ("run", "run_async"):
        assert picture(found[way]["image"]["url"]) == ("PNG", GRID)
    for way in ("stream", "stream_async"):
        assert [picture(event["image"]["url"]) for event in found[way]] == [("JPEG", GRID)] * len(EVENTS)
    assert found["refused"]["status"] == 422
    assert "prompt" in found["refused"]["message"]
