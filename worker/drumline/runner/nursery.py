"""The runner's handle on the nursery, the one child process that is every rank's parent."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from drumline import framing
from drumline import nursery_protocol as wire
from drumline.contract import SERVER_SECRETS
from drumline.errors import SetupFailed
from drumline.protocol import Failure
from drumline.runner.output import Output

_CHUNK = 64 << 10
#: The nursery has nothing to do at the end but to kill ranks and go.
_GOODBYE_SECONDS = 5.0

OnReport = Callable[[wire.NurseryReport], None]


class NurseryHandle:
    """Start the nursery, talk to it, end it. All methods on the event loop's thread."""

    def __init__(self, private_directory: str, on_report: OnReport, on_lost: Callable[[], None]) -> None:
        self._private = private_directory
        self._on_report = on_report
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = framing.FrameReader()
        self._preloaded: asyncio.Future[wire.Preloaded] = self._loop.create_future()
        self._open = False
        self.description: wire.Preloaded | None = None

    @property
    def alive(self) -> bool:
        """False once the nursery is gone."""
        return self._open

    def start(self, reference: str, cwd: str | None, method: str) -> None:
        """Start the process and tell it what to import; :meth:`preloaded` waits for that."""
        self._control, theirs = socket.socketpair()
        self._output = Output(-1)
        interpreter = [sys.executable, *_interpreter_flags()]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [*interpreter, "-m", "drumline.rank.nursery", str(theirs.fileno()), self._private],
                stdin=subprocess.DEVNULL,
                stdout=self._output.writer,
                stderr=self._output.writer,
                pass_fds=(theirs.fileno(),),
                cwd=cwd,
                env=_environment(),
                start_new_session=True,
            )
        self._output.release_writer()
        self._open = True
        self._control.setblocking(False)
        self._loop.add_reader(self._control.fileno(), self._readable)
        path = [entry or os.getcwd() for entry in sys.path]
        self._send(wire.Preload(reference, path, cwd or os.getcwd(), method))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def preloaded(self) -> wire.Preloaded:
        """Wait until the worker's module is imported.

        Raises:
            SetupFailed: importing raised (rank -1), or the nursery died of it.
        """
        return await asyncio.shield(self._preloaded)

    def spawn(self, incarnation: int, config: wire.RankConfig, fds: Sequence[int], *, has_channel: bool) -> None:
        """Ask for a rank. The caller keeps its descriptors."""
        self._send(wire.Spawn(incarnation, config, has_channel), fds)

    def signal(self, incarnation: int, number: int) -> None:
        """Send a signal to the ranks of ``incarnation``."""
        self._send(wire.Signal(incarnation, number))

    def _send(self, request: wire.RunnerRequest, fds: Sequence[int] = ()) -> None:
        if not self._open:
            return
        message = wire.encode(request)
        frame = framing.PREFIX.pack(len(message), 0) + message
        # Requests are rare and small: the socket buffer takes them whole while the nursery imports.
        with suppress(BrokenPipeError, ConnectionError):
            if fds:
                socket.send_fds(self._control, [frame], fds)
            else:
                self._control.send(frame)

    def _readable(self) -> None:
        try:
            data = self._control.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        for _, message in list(self._reader.feed(memoryview(data))):
            report = wire.decode_report(message)
            if isinstance(report, wire.Preloaded):
                self.description = report
                if not self._preloaded.done():
                    self._preloaded.set_result(report)
            elif isinstance(report, wire.PreloadFailed):
                self._output.drain()
                self._fail(_import_failed(report.failure))
            else:
                self._on_report(report)

    def _fail(self, error: SetupFailed) -> None:
        if not self._preloaded.done():
            self._preloaded.set_exception(error)
            self._preloaded.exception()  # somebody may never wait for it

    def _lose(self) -> None:
        if not self._open:
            return
        self._disconnect()
        self._fail(
            _import_failed(Failure("", "the process that imports the worker's module died; its output is in the log"))
        )
        self._on_lost()

    def _disconnect(self) -> None:
        self._open = False
        if not self._loop.is_closed():
            self._loop.remove_reader(self._control.fileno())
        self._control.close()

    async def close(self) -> None:
        """End the nursery, and with it every rank; wait until it is reaped."""
        if self._open:
            self._disconnect()
        reaped = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await asyncio.shield(reaped)
        except TimeoutError:  # stopped, or stuck in an import
            self.kill()
            await reaped
        self._output.drain()
        self._output.close()

    def kill(self) -> None:
        """Kill the nursery at once; ranks die with their parent."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    def abandon(self) -> None:
        """Called at interpreter exit: EOF ends the nursery; do not wait for it."""
        if self._open:
            self._disconnect()
        try:
            self._process.wait(_GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._output.close()


def _import_failed(failure: Failure) -> SetupFailed:
    return SetupFailed(
        failure.message, rank=-1, exception_type=failure.exception_type, remote_traceback=failure.traceback
    )


def _interpreter_flags() -> list[str]:
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    # The user's own modules decide about warnings in their ranks; -W error of a test run must not kill an import.
    return [flag for flag in flags if not flag.startswith("-W")]


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in SERVER_SECRETS}
    # Asking NVML instead of the driver keeps the nursery free of a CUDA context, which a forked rank could not use.
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return environment


def describe_json_schema(description: wire.Preloaded | None) -> dict[str, object] | None:
    """Return the request schema of the described worker, or None."""
    if description is None or not description.schema:
        return None
    return _decoded_schema(description.schema)


@functools.lru_cache(maxsize=16)
def _decoded_schema(text: bytes) -> dict[str, object]:
    """The same object every time: the server compiles it once and asks for it with every request."""
    schema: dict[str, object] = msgspec.json.decode(text)
    return schema
