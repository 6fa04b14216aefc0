"""A port of this machine that leads to an app in a cluster, for as long as one command takes: ``kubectl port-forward``."""

from __future__ import annotations

import contextlib
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

from drumline.cli.cluster_app import Found
from drumline.cli.kubectl import Kubectl, error_of
from drumline.errors import ConnectionFailed

_FORWARDING = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) ->")
_START_SECONDS = 30.0
_END_SECONDS = 10.0
_LONGEST_LINE = 4096


@contextlib.contextmanager
def forwarded(kubectl: Kubectl, app: Found, where: str) -> Iterator[str]:
    """Yield a URL of this machine that leads to a ready pod of ``app``.

    kubectl chooses the pod, and a free port. The API server hands the bytes through to the pod as they are, so API keys,
    streams and cancelling by leaving work as at the Service.

    Raises:
        ConnectionFailed: there is no way to the pod; also in place of one that the caller meets, with kubectl's words.
        ConfigurationError: the user may not do that.
    """
    command = kubectl.command(
        "port-forward",
        f"service/{app.name}",
        f":{app.port}",
        f"--namespace={app.namespace}",
        "--address=127.0.0.1",
        f"--pod-running-timeout={_START_SECONDS:.0f}s",
    )
    with tempfile.TemporaryFile() as complaints, _ended_by_signals():
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
        )
        try:
            assert process.stdout is not None
            port = _port(process.stdout)
            if port is None:
                _end(process)
                raise error_of(_text(complaints), where, "the kubeconfig")
            yield f"http://127.0.0.1:{port}"
        except ConnectionFailed as error:
            said = _text(complaints).strip().splitlines()
            if not said or said[-1] in str(error):
                raise
            told = ConnectionFailed(f"{app.namespace}/{app.name}: {error}; kubectl says: {said[-1]}", sent=error.sent)
            told.request_id = error.request_id
            raise told from error
        finally:
            _end(process)


def _port(output: IO[bytes]) -> int | None:
    """The port that kubectl has taken; None when it ended, or said nothing in time."""
    text, ends = b"", time.monotonic() + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while selector.select(max(0.0, ends - time.monotonic())):
            piece = output.read1(_LONGEST_LINE)  # type: ignore[attr-defined] # a pipe of subprocess is a BufferedReader
            text += piece
            if found := _FORWARDING.search(text):
                return int(found[1])
            if not piece or len(text) > _LONGEST_LINE:
                return None
    return None


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_END_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave in order when somebody ends us, so that no kubectl is left behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
