"""``drumline run --reload``: a parent that keeps the socket and a child that serves; a change of a file replaces the child.

The child is a whole new process, so every import is fresh, also that of an App. While there is none, clients wait in the
socket's queue; while the code is broken, the parent answers 503 with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drumline import problems
from drumline.errors import ConfigurationError

if TYPE_CHECKING:
    from drumline.contract import RunnerSettings

log = logging.getLogger("drumline.reload")

#: Requests in flight have this long before a change takes effect; then the rest of the child has as long to end.
_GRACE = 5.0
_SUFFIXES = (".yaml", ".yml", ".toml")


def keep_running(target: str, read_settings: Callable[[], RunnerSettings]) -> int:
    """Run the app again and again until a signal; return the exit code.

    Args:
        target: as on the command line; its folder is watched.
        read_settings: reads options, environment and target.

    Raises:
        ConfigurationError: the settings are wrong to begin with, or watchfiles is not installed.
    """
    from drumline import logs, targets
    from drumline.server.serve import bind

    try:
        import watchfiles
    except ImportError:
        raise ConfigurationError("--reload needs watchfiles: pip install 'drumline[worker]'") from None
    settings = read_settings()
    logs.configure(settings.log_format, settings.log_level)
    path = targets.parse(target).path
    folder = path if path is None or path.is_dir() else path.parent
    changes = watchfiles.awatch(
        folder or Path.cwd(),
        watch_filter=watchfiles.PythonFilter(extra_extensions=_SUFFIXES),
        debounce=400,
        step=50,
        recursive=True,
    )
    sockets = bind(settings.host, settings.port)
    try:
        return asyncio.run(_Parent(sockets, changes).run())
    finally:
        for each in sockets:
            each.close()


class _Parent:
    def __init__(self, sockets: Sequence[socket.socket], changes: AsyncIterator[Any]) -> None:
        self._sockets = sockets
        self._changes = changes
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._child: asyncio.subprocess.Process | None = None
        self._signals = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        watching = loop.create_task(self._watch())
        lifeline, keep = os.pipe()
        try:
            while True:
                self._changed.clear()
                code = await self._one_life(lifeline)
                if self._stop.is_set():
                    return code
                if not self._changed.is_set():
                    log.warning("the app ended with code %d; waiting for a change", code)
                    async with self._answer_unavailable(code):
                        await _first(self._changed, self._stop)
                    if self._stop.is_set():
                        return code
                log.info("a file changed: starting anew")
        finally:
            os.close(keep)
            os.close(lifeline)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _one_life(self, lifeline: int) -> int:
        """Start a child; return its exit code when it ended, by itself or because of a change or a signal."""
        fds = [each.fileno() for each in self._sockets]
        arguments = [each for each in sys.argv[1:] if each != "--reload"]
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "drumline", *arguments, "--inherit", ",".join(map(str, [*fds, lifeline])),
            pass_fds=[*fds, lifeline],
            # Ctrl-C reaches the parent alone, which passes it on: else the child would count it twice.
            process_group=0,
        )  # fmt: skip
        ended = asyncio.create_task(child.wait())
        await _first(ended, self._changed, self._stop)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if ended.done() or self._stop.is_set():
                break
            child.send_signal(number)
            await asyncio.wait([ended], timeout=_GRACE)
        code = await ended
        self._child = None
        return code

    def _on_signal(self, number: int) -> None:
        self._stop.set()
        self._signals += 1
        if self._child is not None and self._child.returncode is None:
            # The first one drains, the second one stops what is left, as without --reload; a third one ends all.
            self._child.send_signal(number if self._signals < 3 else signal.SIGKILL)

    async def _watch(self) -> None:
        async for _ in self._changes:
            self._changed.set()

    @contextlib.asynccontextmanager
    async def _answer_unavailable(self, code: int) -> AsyncIterator[None]:
        """Answer every request with 503 meanwhile."""
        problem = problems.make("not-ready", f"the app ended with code {code}; its output says why", retry_after=2.0)
        body = problem.body()
        headers = [*problem.headers(), ("content-length", str(len(body))), ("connection", "close")]
        head = "HTTP/1.1 503 Service Unavailable\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
        answer = head.encode() + b"\r\n" + body

        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(answer)
                    await writer.drain()
            writer.close()

        servers = [await asyncio.start_server(respond, sock=each.dup()) for each in self._sockets]
        try:
            yield
        finally:
            for server in servers:
                server.close()


async def _first(*waits: Any) -> None:
    """Return when the first of the events and tasks is there."""
    tasks = [asyncio.create_task(each.wait()) if isinstance(each, asyncio.Event) else each for each in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


@contextlib.contextmanager
def inherited(numbers: str | None) -> Iterator[dict[str, Any]]:
    """In the child: take over the parent's sockets, and stop when the parent is gone; else do nothing.

    Args:
        numbers: file descriptors, comma separated: the sockets, then the end of a pipe that closes with the parent.
    """
    if numbers is None:
        yield {}
        return
    *fds, lifeline = map(int, numbers.split(","))
    threading.Thread(target=_wait_for_end, args=(lifeline,), daemon=True).start()
    sockets = [socket.socket(fileno=each) for each in fds]
    for each in sockets:
        os.set_inheritable(each.fileno(), False)
        each.setblocking(False)
    os.set_inheritable(lifeline, False)
    yield {"sockets": sockets}


def _wait_for_end(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
