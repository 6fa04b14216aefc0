"""``drumline run``, ``serve``, ``invoke``, ``stream`` and ``doctor`` as people use them: processes, signals, files."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from PIL import Image

from drumline.client import Client
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError

DRUMLINE = [sys.executable, "-m", "drumline"]
WORKERS = "drumline.testing.workers"
WAIT = 45.0

PAINTER = """
from PIL import Image
from drumline.distributed import DistributedWorker


class Painter(DistributedWorker):
    def setup(self, colour: str = "red"):
        self.colour = colour

    def __call__(self, streaming: bool = False, *, steps: int = 2, size: int = 8) -> dict:
        for step in range(steps):
            self.checkpoint()
            self.progress(step + 1, steps)
            if streaming and self.rank == 0:
                self.add_streaming_result({"image": Image.new("RGB", (size, size), (step, 0, 0))})
        return {"images": [Image.new("RGB", (size, size), self.colour)], "ranks": self.world_size}
"""

APP = """
import drumline
from drumline.distributed import DistributedRunner
from drumline.testing.workers import Echo
from pydantic import BaseModel


class Request(BaseModel):
    word: str


class Words(drumline.App, num_gpus=2):
    async def setup(self):
        self.runner = DistributedRunner(Echo, world_size=self.num_gpus)
        await self.runner.start()

    @drumline.endpoint("/")
    async def say(self, request: Request) -> dict:
        result = await self.runner.invoke({"word": request.word})
        return {"said": result["word"] + "VERSION", "ranks": self.runner.world_size}
"""


class Running:
    """A ``drumline`` command that goes on, and the JSON log that it writes."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, folder: Path | None = None) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRUMLINE_")}
        self.process = subprocess.Popen(
            [*DRUMLINE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**inherited, **(env or {})},
        )
        self.log: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.errors = ""
        self._readers = [threading.Thread(target=self._read_log), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def until(self, text: str) -> dict[str, Any]:
        """The next log line with ``text`` in its message."""
        while True:
            line = self._lines.get(timeout=WAIT)
            assert line is not None, f"ended before {text!r}: {self.end()}; {self.errors}; {self.log[-9:]}"
            self.log.append(line)
            if text in line["message"]:
                return line

    def url(self) -> str:
        """Its address, when the app is ready."""
        address: str = self.until("ready: ")["url"]
        return address

    def end(self, number: int | None = None) -> int:
        """Send a signal, wait, return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(WAIT)
        for reader in self._readers:
            reader.join(WAIT)
        while (line := self._lines.get(timeout=WAIT) if not self._lines.empty() else None) is not None:
            self.log.append(line)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Running]]:
    """Start commands; whatever is left is ended with the module."""
    running: list[Running] = []

    def make(*arguments: str, **keywords: Any) -> Running:
        running.append(Running(*arguments, **keywords))
        return running[-1]

    yield make
    for each in running:
        if each.process.poll() is None:
            each.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("painter") / "painter.py"
    file.write_text(PAINTER)
    return file


@pytest.fixture(scope="module")
def painting(start: Callable[..., Running], painter: Path) -> tuple[Running, str]:
    """The painter on two ranks, and its address."""
    running = start("run", str(painter), "-n", "2", "--port", "0", "--setup", "colour=blue")
    return running, running.url()


@pytest.fixture(scope="module")
def served(painting: tuple[Running, str]) -> str:
    return painting[1]


@pytest.fixture(scope="module")
def stepping(start: Callable[..., Running]) -> tuple[Running, str]:
    """A worker that takes long, and its address."""
    running = start("run", f"{WORKERS}:Steps", "--port", "0")
    return running, running.url()


def drumline(*arguments: str, env: dict[str, str] | None = None, folder: Path | None = None) -> Any:
    return subprocess.run(
        [*DRUMLINE, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        cwd=folder,
        env={**os.environ, **(env or {})},
    )


# -- invoke and stream


def test_invoke_puts_images_into_files_and_prints_the_rest(served: str, tmp_path: Path) -> None:
    done = drumline("invoke", served, "steps=1", "--output", "out", "--name", "sky", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["ranks"] == 2
    assert printed["images"][0]["url"] == "out/sky.jpg"
    assert done.stderr == "saved out/sky.jpg\n"
    with Image.open(tmp_path / "out" / "sky.jpg") as image:
        red, _, blue = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    assert blue > 200 > red


def test_stream_saves_previews_as_they_come(served: str, tmp_path: Path) -> None:
    done = drumline("stream", served, "steps=2", "--output", str(tmp_path), "--name", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"][0]["url"] == f"{tmp_path}/x.jpg"
    previews = sorted(path.name for path in tmp_path.iterdir())
    assert previews == ["x-preview-1.jpg", "x-preview-3.jpg", "x.jpg"]
    assert f"preview {tmp_path}/x-preview-1.jpg" in done.stderr


def test_stream_prints_events_for_programs(served: str) -> None:
    done = drumline("stream", served, "steps=1", "--events")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(event["event"], event["id"]) for event in events] == [("update", 0), ("update", 1), ("result", 2)]
    assert events[0]["data"] == {"progress": {"done": 1, "total": 1}}


def test_a_wrong_request_is_1_and_names_the_field(served: str) -> None:
    done = drumline("invoke", served, "steps=many", "colour=red")
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert re.match(r"error: .*steps: .*integer.*colour: .*\(request [0-9a-f]{32}\)", error)
    assert hint.startswith("try: ")


def test_a_wrong_path_is_2(served: str) -> None:
    done = drumline("invoke", served, "--path", "/nowhere")
    assert done.returncode == 2
    assert "error: " in done.stderr


def test_a_time_out_is_1_and_stops_the_ranks(stepping: tuple[Running, str]) -> None:
    _, url = stepping
    done = drumline("invoke", url, "steps=1000", "seconds=0.05", "--timeout", "0.5")
    assert done.returncode == 1
    assert "within 0.5 s" in done.stderr
    assert "try:   a longer --timeout" in done.stderr
    with Client(url) as client:
        assert client.invoke({"steps": 1, "tag": "next"}, timeout=20)["tag"] == "next"


def test_ctrl_c_of_a_stream_cancels_its_request(stepping: tuple[Running, str]) -> None:
    running, url = stepping
    command = [*DRUMLINE, "stream", url, "steps=2000", "seconds=0.05", "--events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["event"] == "update"
        client.send_signal(signal.SIGINT)
        _, errors = client.communicate(timeout=WAIT)
    assert client.returncode == 1
    assert errors == "interrupted\n"
    assert running.until("POST /stream")["outcome"] == "cancelled"


# -- run


def test_the_process_that_began_to_import_before_the_server_is_the_ranks_parent(painting: tuple[Running, str]) -> None:
    (nursery,) = psutil.Process(painting[0].process.pid).children()
    assert len(nursery.children()) == 2


@pytest.mark.linux  # looks at /proc
def test_the_serving_process_does_not_load_torch(painting: tuple[Running, str]) -> None:
    maps = Path(f"/proc/{painting[0].process.pid}/maps").read_text()
    assert "msgspec" in maps
    assert "libtorch" not in maps


def test_a_terminal_sees_progress_and_lines_to_paste(painter: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*DRUMLINE, "run", str(painter), "-n", "2", "--port", "0"], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    seen = ""
    try:
        while "/docs\r\n" not in seen:
            seen += os.read(ours, 65536).decode()
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
        commands = re.findall(r"curl .*?(?=\r)", plain)
        answers = [
            subprocess.run(shlex.split(line), capture_output=True, timeout=WAIT, check=True) for line in commands
        ]
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal is gone with its last user
            while more := os.read(ours, 65536):
                seen += more.decode()
    finally:
        code = process.wait(WAIT)
        os.close(ours)
    assert code == 0
    assert "ranks ready" in plain
    assert "painter is ready: 2 ranks on cpu" in plain
    assert "Traceback" not in seen
    assert json.loads(answers[0].stdout)["ranks"] == 2
    assert b"event: result" in answers[1].stdout


def test_an_app_is_run_with_its_endpoints(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(APP)
    running = start("run", "words.py", "--port", "0", "-n", "1", folder=tmp_path)
    with Client(running.url()) as client:
        assert client.invoke({"word": "hey"}) == {"said": "heyVERSION", "ranks": 1}
    assert running.end(signal.SIGTERM) == 0


def test_a_manifest_is_run_and_options_win(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text(
        "apiVersion: drumline.dev/v1alpha1\nkind: DistributedApp\nmetadata: {name: facts}\n"
        f"spec: {{workerClass: '{WORKERS}:Facts', numGPUs: 0, worldSize: 2, setupArgs: {{a: 1, b: 2}}, "
        "env: [{name: FLAVOUR, value: mint}]}\n"
    )
    running = start("run", str(tmp_path / "app.yaml"), "--port", "0", "-n", "1", "--setup", "b=3", "--setup", "c=x")
    with Client(running.url()) as client:
        (rank,) = client.invoke()["ranks"]
    assert rank["kwargs"] == {"a": 1, "b": 3, "c": "x"}
    assert running.end(signal.SIGTERM) == 0


def test_a_failing_setup_is_1_and_names_rank_and_exception() -> None:
    done = drumline(
        "run", f"{WORKERS}:Fails", "-n", "2", "--port", "0", "--setup", "fail_rank=1", "--log-format", "text"
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()[-2:]
    assert error == f"error: rank 1: {WORKERS}.WorkerExploded: exploded on purpose"
    assert hint.startswith("try:   drumline doctor")
    assert "Traceback" in done.stderr, "the rank's own traceback is part of its output"


def test_a_class_that_does_not_exist_is_told(painter: Path) -> None:
    done = drumline("run", f"{painter}:Sculptor", "--port", "0", "--log-format", "text")
    assert done.returncode != 0
    assert "Sculptor" in done.stderr.splitlines()[-2]
    assert "Painter" in done.stderr.splitlines()[-2]


def test_a_port_in_use_is_2_and_says_what_to_do(served: str, painter: Path) -> None:
    port = served.rpartition(":")[2]
    done = drumline("run", str(painter), "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_and_certificates(start: Callable[..., Running], painter: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(tmp_path / "cert.pem"), append=True)
    running = start(
        "run", str(painter), "--port", "0", "--api-key", "s3cret",
        "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"),
    )  # fmt: skip
    url = running.url()
    assert url.startswith("https://")
    trusting = ["--cacert", str(tmp_path / "ca.pem"), "--output", str(tmp_path)]
    done = drumline("invoke", url, "steps=1", *trusting, env={"DRUM_API_KEY": "s3cret"})
    assert done.returncode == 0, done.stderr
    done = drumline("invoke", url, "steps=1", *trusting)
    assert done.returncode == 2
    assert "try:   --api-key KEY" in done.stderr
    done = drumline("invoke", url, "steps=1", env={"DRUM_API_KEY": "s3cret"})
    assert done.returncode == 1
    assert "certificate" in done.stderr.lower()
    with Client(url, verify=str(tmp_path / "ca.pem"), api_key="wrong") as client, pytest.raises(ConfigurationError):
        client.status()
    assert running.end(signal.SIGTERM) == 0


# -- reload


def test_reload_serves_the_new_code_at_the_same_address(start: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "words.py"
    file.write_text(APP)
    running = start("run", "words.py", "--port", "0", "-n", "1", "--reload", folder=tmp_path)
    url = running.url()
    with Client(url, retries=50, timeout=WAIT) as client:
        assert client.invoke({"word": "a"})["said"] == "aVERSION"
        file.write_text(APP.replace("VERSION", " two"))
        running.until("a file changed")
        assert client.invoke({"word": "a"})["said"] == "a two", "a request meanwhile waits"
        assert running.url() == url

        file.write_text(APP + "\ndef broken(\n")
        running.until("waiting for a change")
        with Client(url) as impatient, pytest.raises(Exception, match="its output says why"):
            impatient.invoke({"word": "a"})
        file.write_text(APP.replace("VERSION", " four"))
        running.until("a file changed")
        assert client.invoke({"word": "a"})["said"] == "a four"
    assert running.end(signal.SIGINT) == 0


def test_no_server_outlives_a_reloading_parent(start: Callable[..., Running], painter: Path) -> None:
    running = start("run", str(painter), "--port", "0", "--reload")
    running.url()
    # That nothing is left is looked at after every test here.
    assert running.end(signal.SIGKILL) == -signal.SIGKILL


# -- serve


def environment(**settings: Any) -> dict[str, str]:
    return RunnerSettings(host="127.0.0.1", port=0, drain_delay=0, **settings).to_env()


def test_serve_runs_from_the_environment_and_logs_json(start: Callable[..., Running]) -> None:
    # An app for GPUs, that is told to make do with the CPU.
    env = environment(target=f"{WORKERS}:Talks", num_gpus=2, device="cpu", name="talks", namespace="team")
    running = start("serve", env=env)
    url = running.url()
    with Client(url) as client:
        assert [rank["device"] for rank in client.status()["ranks"]] == ["cpu", "cpu"]
    with Client(f"{url}/team/talks") as client:
        client.invoke({"tag": "hello"}, request_id="r-1")
    with Client(f"{url}/team/other") as client, pytest.raises(ConfigurationError):
        client.invoke({"tag": "hello"})
    assert running.end(signal.SIGTERM) == 0
    said = [line for line in running.log if line["message"].startswith("hello rank=")]
    assert sorted(line["rank"] for line in said) == [0, 1]
    assert {line["request_id"] for line in said} == {"r-1"}
    access = next(line for line in running.log if line["logger"] == "drumline.access" and line["request_id"] == "r-1")
    assert (access["outcome"], access["status"]) == ("ok", 200)
    assert access["run_time"] > 0
    assert all({"time", "level", "logger", "message"} <= set(line) for line in running.log)


def test_serve_ends_with_the_reason_when_the_ranks_cannot_start(start: Callable[..., Running], tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    env = environment(target=f"{WORKERS}:Fails", setup_args={"fail_rank": 0}, termination_log=str(log))
    running = start("serve", env=env)
    assert running.end() == 1
    assert log.read_text().startswith(f"SetupFailed: rank 0: {WORKERS}.WorkerExploded: exploded on purpose\nTraceback")


def test_serve_ends_when_the_restart_budget_is_used_up(start: Callable[..., Running], tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    env = environment(target=f"{WORKERS}:Fails", restart={"max_restarts": 0}, termination_log=str(log))
    running = start("serve", env=env)
    with Client(running.url()) as client, contextlib.suppress(Exception):
        client.invoke({"how": "kill"})
    assert running.end() == 1
    assert "rank 0" in log.read_text()
    assert "SIGKILL" in log.read_text()


def test_serve_refuses_to_run_a_gpu_app_on_the_cpu(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    env = environment(target=f"{WORKERS}:Echo", num_gpus=2, termination_log=str(log)) | {"CUDA_VISIBLE_DEVICES": ""}
    done = drumline("serve", env=env)
    assert done.returncode == 2
    assert "num_gpus is 2, but this process sees no CUDA device" in done.stderr
    assert "DRUMLINE_DEVICE=cpu" in log.read_text()


# -- doctor


def test_doctor_names_each_problem_with_its_cure() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -Sn 256; exec "$0" "$@"', *DRUMLINE, "doctor", "--no-cluster", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    told = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert {"platform", "packages", "GPUs", "torch", "open files", "loopback", "port"} <= set(found)
    assert found["torch"]["status"] == "ok"
    assert found["open files"]["status"] == "problem"
    assert "ulimit -n" in found["open files"]["cure"]
    assert not told["ok"]
    assert done.returncode == 1
