"""The runner's handle on the nursery, the one child process that is every rank's parent."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence

import msgspec

from drumline import framing
from drumline import nursery_protocol as wire
from drumline.errors import SetupFailed
from drumline.protocol import Failure
from drumline.runner.nursery_process import GOODBYE_SECONDS, Asked, started
from drumline.runner.output import Output

_CHUNK = 64 << 10

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

    def start(self, asked: Asked) -> None:
        """Start the process, which imports what is asked for; :meth:`preloaded` waits for that."""
        self._nursery = started(asked, self._private)
        self._control = self._nursery.control
        self._output = Output(-1, self._nursery.output)
        self._open = True
        self._loop.add_reader(self._control.fileno(), self._readable)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._nursery.process.pid

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
        if self._open:
            self._nursery.send(request, tuple(fds))

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
        reaped = asyncio.ensure_future(asyncio.to_thread(self._nursery.process.wait))
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await asyncio.shield(reaped)
        except TimeoutError:  # stopped, or stuck in an import
            self.kill()
            await reaped
        self._output.drain()
        self._output.close()

    def kill(self) -> None:
        """Kill the nursery at once; ranks die with their parent."""
        self._nursery.kill()

    def abandon(self) -> None:
        """Called at interpreter exit: EOF ends the nursery; do not wait for it."""
        if self._open:
            self._disconnect()
        self._nursery.reap()
        self._output.close()


def _import_failed(failure: Failure) -> SetupFailed:
    return SetupFailed(
        failure.message, rank=-1, exception_type=failure.exception_type, remote_traceback=failure.traceback
    )


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
