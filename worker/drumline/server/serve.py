"""A service's life behind a socket: bind, start, serve, drain on a signal, tear down."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, DrumlineError, NotReady
from drumline.server import limits
from drumline.server.app import create_app
from drumline.server.connection_limit import ConnectionLimit, affordable
from drumline.server.connections import Connection
from drumline.server.edge import Edge
from drumline.server.service import Phase, Service

log = logging.getLogger("drumline.server")

#: After the ranks are done, clients have this long to take the rest of their answers.
FLUSH_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """How a server's life ended.

    Attributes:
        error: why it could not start or go on; None after an orderly stop.
        signal: the signal that asked it to stop, if one did.
        forced: a second signal came, so that requests in flight were given up.
    """

    error: BaseException | None = None
    signal: int | None = None
    forced: bool = False


async def serve(
    service: Service,
    settings: RunnerSettings | None = None,
    *,
    on_bound: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
    handle_signals: bool = True,
    sockets: Sequence[socket.socket] | None = None,
) -> Ended:
    """Serve until a signal (or ``stop``) and return how it ended; what went wrong is returned, not raised.

    The socket is bound first, so that ``/healthz`` answers while ranks load. The first SIGTERM or SIGINT: not ready at
    once, calls are taken for another ``drain_delay``, then those in flight have ``drain_timeout``, then streams get
    their terminal event, ``teardown()`` runs, and all is closed. A second signal gives up what is in flight; a third
    one kills the process.

    Args:
        service: what is served.
        settings: of the container; default: the service's own.
        on_bound: called with the server's URL as soon as it is bound (useful with port 0).
        on_ready: called when the service is up.
        stop: set it to stop as after a first signal.
        handle_signals: False leaves SIGINT and SIGTERM alone.
        sockets: listening sockets to take over (see :func:`bind`), in place of the address in the settings.

    Raises:
        ConfigurationError: the address cannot be bound, the certificate cannot be read, or signals are to be handled
            outside of the main thread.
    """
    settings = settings or service.settings
    if handle_signals and threading.current_thread() is not threading.main_thread():
        raise ConfigurationError(
            "serve() handles signals and so must run in the main thread; or call it with handle_signals=False"
        )
    context = _tls(settings)
    listening = bind(settings.host, settings.port) if sockets is None else list(sockets)
    edge = create_app(service, settings)
    server = _Server(edge, context, ConnectionLimit(affordable(settings.max_connections, settings.world_size)))
    life = _Life(service, settings, edge, stop or asyncio.Event())
    with life.signals() if handle_signals else contextlib.nullcontext():
        async with server.running(listening):
            if on_bound is not None:
                on_bound(_url(settings, listening))
            return await life.run(on_ready)


def run(service: Service, settings: RunnerSettings | None = None, **keywords: Any) -> Ended:
    """Run :func:`serve` on a new event loop (uvloop where it is installed) and return how it ended."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(service, settings, **keywords))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Life:
    """One service from start to end."""

    def __init__(self, service: Service, settings: RunnerSettings, edge: Edge, stop: asyncio.Event) -> None:
        self._service = service
        self._settings = settings
        self._edge = edge
        self._stop = stop
        self._force = asyncio.Event()
        self._signal: int | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._stop.is_set():
            log.info("%s: draining; once more to stop now", name)
            self._signal = number
            self._stop.set()
        elif not self._force.is_set():
            log.warning("%s again: stopping now", name)
            self._force.set()
        else:
            os._exit(128 + number)

    async def run(self, on_ready: Callable[[], None] | None) -> Ended:
        starting = asyncio.create_task(self._service.start())
        try:
            error = await self._up(starting, on_ready)
        except BaseException:
            # The caller gives up (a cancelled task): nothing may be left behind all the same.
            self._force.set()
            await self._outcome(starting)
            await self._take_down()
            raise
        failed = await self._take_down()
        error = error or failed
        self._service.board.enter(Phase.STOPPED if error is None else Phase.FAILED)
        return Ended(error, self._signal, self._force.is_set())

    async def _up(self, starting: asyncio.Task[None], on_ready: Callable[[], None] | None) -> BaseException | None:
        """From the start until nothing is in flight any more; returns why it could not start or go on."""
        board = self._service.board
        await _first(starting, self._stop.wait())
        error = await self._outcome(starting)
        if error is None and not self._stop.is_set():
            gc.freeze()  # what is loaded by now stays; a collection need not look at it while requests wait
            board.enter(Phase.READY)
            if on_ready is not None:
                on_ready()
            await _first(board.until(lambda: board.failed), self._stop.wait())
            error = self._failure() if board.failed else None
        if error is not None:
            board.fail(error)
        else:
            await self._drain()
        return error

    async def _outcome(self, starting: asyncio.Task[None]) -> BaseException | None:
        """How the start ended; one that was interrupted by a stop is cancelled and waited for."""
        if not starting.done():
            starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            if not starting.cancelled():
                starting.cancel()
                raise
        except Exception as error:
            log.error("the start failed: %s", error, exc_info=None if isinstance(error, DrumlineError) else error)
            return error
        return None

    def _failure(self) -> BaseException:
        failure = self._service.board.status()["lastFailure"]
        text = failure["message"] if failure else "no reason is known"
        log.error("the group failed and may not be restarted any more: %s", text)
        words = f"the group failed and may not be restarted any more: {text}"
        return NotReady(words, state="failed", failure=failure)

    async def _drain(self) -> None:
        service, settings = self._service, self._settings
        was_ready = service.board.phase is Phase.READY
        service.board.enter(Phase.LEAVING if was_ready else Phase.DRAINING)
        if service.leave is not None:
            try:
                service.leave()
            except Exception:
                log.exception("handle_exit() failed")
        if was_ready:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_delay):
                    await self._force.wait()
        service.board.enter(Phase.DRAINING)
        await _first(self._let_finish(), self._force.wait())

    async def _let_finish(self) -> None:
        """Wait for calls in flight; what is left then is cancelled, and its clients are told."""
        runners = self._service.runners()
        if self._service.runner is None:
            # An App's call may need its runner several times, so its calls are waited for before runners refuse any.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain_timeout):
                    await self._edge.until_idle()
            await asyncio.gather(*(runner.drain(0) for runner in runners))
        else:
            await asyncio.gather(*(runner.drain(self._settings.drain_timeout) for runner in runners))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._edge.until_idle()

    async def _take_down(self) -> BaseException | None:
        stopping = asyncio.create_task(self._service.stop())
        await _first(stopping, self._force.wait())
        if not stopping.done():
            stopping.cancel()
            await asyncio.wait([stopping])
        rest = [runner.stop(0) for runner in self._service.runners()]
        for outcome in await asyncio.gather(stopping, *rest, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("stopping failed: %s", outcome)
                return outcome
        return None


class _Server(uvicorn.Server):
    """uvicorn without its own signals; it stops when the block of :meth:`running` ends."""

    def __init__(self, app: Edge, context: ssl.SSLContext | None, limit: ConnectionLimit) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, limit, app.begin),  # type: ignore[arg-type]  # it is called, no more
                ws="none",
                proxy_headers=False,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=int(limits.KEEP_ALIVE_SECONDS),
                timeout_graceful_shutdown=1,
                ssl_context_factory=(lambda config, default: context) if context is not None else None,
            )
        )
        self._leave = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller."""
        yield

    async def main_loop(self) -> None:
        """Wait until it is time to leave. uvicorn would wake up every 0.1 s; the date header is the connections' business."""
        await self._leave.wait()

    @contextlib.asynccontextmanager
    async def running(self, sockets: list[socket.socket]) -> AsyncIterator[None]:
        """Accept connections inside of the block."""
        bound = asyncio.Event()
        serving = asyncio.create_task(self._serve_and_tell(sockets, bound))
        try:
            await _first(bound.wait(), asyncio.shield(serving))
            if serving.done():
                await serving
            yield
        finally:
            self.should_exit = True
            self._leave.set()
            await serving

    async def _serve_and_tell(self, sockets: list[socket.socket], bound: asyncio.Event) -> None:
        self._bound = bound
        await self.serve(sockets=sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        await super().startup(sockets=sockets)
        self._bound.set()


async def _first(*waits: Any) -> None:
    """Return when the first of ``waits`` is over; coroutines among the others are cancelled, tasks go on."""
    tasks = [wait if isinstance(wait, asyncio.Future) else asyncio.ensure_future(wait) for wait in waits]
    ours = [task for task, wait in zip(tasks, waits, strict=True) if task is not wait]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in ours:
            task.cancel()
        for outcome in await asyncio.gather(*ours, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def bind(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets for every address of ``host``, all on the same port (0: a free one).

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in sorted(dict.fromkeys(found)):
            bound = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                made = socket.create_server((str(address[0]), bound), family=family, backlog=2048)
            except OSError:
                # Of several addresses ("localhost" is two) one may be unusable here, e.g. IPv6 in a container.
                if not sockets and address == found[-1][4]:
                    raise
                continue
            made.setblocking(False)
            sockets.append(made)
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "choose another with --port (0 picks a free one)" if port else "choose another with --host"
        raise ConfigurationError(f"cannot listen on {host}:{port}: {reason}; {cure}") from error
    return sockets


def _url(settings: RunnerSettings, sockets: list[socket.socket]) -> str:
    host, port = sockets[0].getsockname()[:2]
    if host in ("0.0.0.0", "::") or settings.host == "localhost":
        host = "localhost"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{shown}:{port}"


def _tls(settings: RunnerSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigurationError("tls_key is set without tls_cert; give both or none")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        files = f"{settings.tls_cert}" + (f" with {settings.tls_key}" if settings.tls_key else "")
        raise ConfigurationError(f"the certificate {files} cannot be used: {error}") from error
    return context
