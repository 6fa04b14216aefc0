"""The demo: start this folder's app as people do, draw a picture, draw one with live previews, stop. `make demo`.

The model is a random one of 5 MB, so nothing is downloaded and any machine will do. With enough GPUs it runs on them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
from PIL import Image

from drumline.client import Client, save_images

HERE = Path(__file__).parent
PROMPTS = ("a lighthouse at dusk", "a garden after the rain")


class DemoError(Exception):
    """Something did not go as it should."""


class Server:
    """`drumline run` in its own process group, with its output in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        drumline = Path(sys.executable).with_name("drumline")
        self.command = ["drumline", "run", os.path.relpath(HERE / "app.yaml"), "--setup", "model=tiny"]
        self.command += ["--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(drumline), *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "DRUMLINE_DRAIN_DELAY": "0"},  # nobody balances load here
            )

    def wait_until_ready(self) -> dict[str, Any]:
        """Return the status of the ready app.

        Raises:
            DemoError: it failed or ended.
        """
        with httpx2.Client(base_url=self.url, timeout=40, trust_env=False) as http:
            while True:
                try:
                    answer = http.get("/readyz")
                    status: dict[str, Any] = answer.json()
                    if answer.status_code == 200:
                        return status
                    if status["state"] in {"failed", "stopped"}:
                        raise DemoError(f"the app {status['state']}: {status['lastFailure']}")
                    http.get("/status", params={"since": status["version"]})  # answers when something changes
                except httpx2.TransportError:
                    # It does not listen yet; that it ends is the only thing to wait for.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = self.process.wait(timeout=0.05)
                        raise DemoError(f"drumline run ended with {code}") from None

    def stop(self) -> None:
        """Send SIGTERM and wait.

        Raises:
            DemoError: it did not exit with 0, or left a process behind.
        """
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        if code != 0:
            raise DemoError(f"drumline run exited with {code} after SIGTERM")

    def kill(self) -> None:
        """End whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    """Whether there is a process ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def check_picture(path: Path, ranks: int) -> str:
    """Return the picture's size as text.

    Raises:
        DemoError: it does not hold one different image per rank.
    """
    with Image.open(path) as picture:
        width, height = picture.size
        side = min(width, height) if ranks <= 2 else height // 2
        tiles = {picture.crop((x, 0, x + side, side)).tobytes() for x in range(0, width, side)}
    if len(tiles) != width // side:
        raise DemoError(f"{path}: ranks drew the same image")
    return f"{width}x{height}"


def say(step: str, text: str, seconds: float | None = None) -> None:
    """Print one line: what, details, how long."""
    took = "" if seconds is None else f"{seconds:8.2f} s"
    print(f"  {step:8} {text:62}{took}".rstrip(), flush=True)


def demo(server: Server, out: Path, request: dict[str, Any]) -> None:
    """Run all parts, printing what happened."""
    say("run", " ".join(server.command))
    started = time.monotonic()
    status = server.wait_until_ready()
    ranks = status["ranks"]
    devices = ", ".join(sorted({rank["device"] for rank in ranks}))
    say("ready", f"{len(ranks)} ranks on {devices}", time.monotonic() - started)
    with Client(server.url) as app:
        started = time.monotonic()
        _, files = save_images(app.invoke({**request, "prompt": PROMPTS[0]}), out, "invoke")
        say("invoke", f"{files[0]} ({check_picture(files[0], len(ranks))})", time.monotonic() - started)
        stream(app, out, {**request, "prompt": PROMPTS[1]}, len(ranks))
    started = time.monotonic()
    server.stop()
    left = [rank["pid"] for rank in ranks if alive(rank["pid"])]
    if left:
        raise DemoError(f"ranks are still there: {left}")
    try:
        os.killpg(server.process.pid, 0)
    except ProcessLookupError:
        say("stopped", "SIGTERM, exit code 0, no process left", time.monotonic() - started)
    else:
        raise DemoError("drumline run left a process behind")


def stream(app: Client, out: Path, request: dict[str, Any], ranks: int) -> None:
    """Draw one picture with previews."""
    steps, previews = [], 0
    started = time.monotonic()
    for event in app.stream(request):
        data = event.data
        if "progress" in data:
            steps.append(data["progress"]["done"])
            if sys.stdout.isatty():
                print(f"\r  stream   step {steps[-1]:.0f} of {data['progress']['total']:.0f}\033[K", end="", flush=True)
            continue
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        last = event.type == "result"
        previews += not last
        _, files = save_images(data, out, "stream" if last else f"preview-{previews}")
        where = "final" if last else f"preview at step {steps[-1]:.0f}"
        say("stream", f"{files[0]} ({where})", time.monotonic() - started)
    check_picture(files[0], ranks)
    wanted = list(range(1, request["num_inference_steps"] + 1))
    if steps != wanted or not previews:
        raise DemoError(f"progress came as {steps} with {previews} previews")


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise :class:`DemoError` in the main thread after ``seconds``."""

    def over(_: int, __: FrameType | None) -> None:
        raise DemoError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where pictures go (demo-output)")
    parser.add_argument("--size", type=int, default=256, help="side of one image in pixels (256)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--seed", type=int, help="for the same pictures again")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for all of it (300)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    request = {"width": args.size, "height": args.size, "num_inference_steps": args.steps, "seed": args.seed}
    print("drumline demo: every rank of a tiny random SDXL draws the same prompt from its own noise")
    started = time.monotonic()
    server = Server(args.out / "server.log")
    try:
        with bounded(args.timeout):
            demo(server, args.out, request)
    except Exception as error:  # whatever it is, it is told and the exit code says it
        print(f"demo failed: {type(error).__name__}: {error}\nthe end of {server.log}:", file=sys.stderr)
        print("".join(server.log.read_text(errors="replace").splitlines(keepends=True)[-25:]), file=sys.stderr)
        return 1
    finally:
        server.kill()
    say("done", f"pictures and server.log are in {args.out}/", time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
