"""A real server for tests: a service behind a socket of this process, on an event loop and thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from drumline.contract import RunnerSettings
from drumline.distributed import DistributedRunner
from drumline.server.serve import Ended, serve
from drumline.server.service import Service, worker_service


class Server:
    """A server that runs.

    Attributes:
        url: where.
        service: what; it belongs to the server's thread.
    """

    def __init__(self, make: Callable[[], Service], until_ready: bool) -> None:
        self._up: Future[tuple[str, Service]] = Future()
        self._ended: Future[Ended] = Future()
        self._make = make
        self._until_ready = until_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="test server")
        self._thread.start()
        self.url, self.service = self._up.result()

    def stop(self) -> Ended:
        """Stop as after a first signal; wait for the end."""
        if self._loop is not None and not self._ended.done():
            self._loop.call_soon_threadsafe(self._stop.set)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for the end."""
        self._thread.join()
        return self._ended.result()

    def timers(self) -> list[str]:
        """Return what the server's event loop will wake up for although nothing happens."""
        assert self._loop is not None

        async def armed() -> list[str]:
            scheduled: list[asyncio.TimerHandle] = vars(asyncio.get_running_loop())["_scheduled"]
            return [repr(timer) for timer in scheduled if not timer.cancelled()]

        return asyncio.run_coroutine_threadsafe(armed(), self._loop).result()

    def _run(self) -> None:
        try:
            ended = asyncio.run(self._serve())
        except BaseException as error:
            self._ended.set_exception(error)
            if not self._up.done():
                self._up.set_exception(error)
            return
        self._ended.set_result(ended)
        if not self._up.done():
            self._up.set_exception(ended.error or RuntimeError("the server ended before it was up"))

    async def _serve(self) -> Ended:
        self._loop = asyncio.get_running_loop()
        service, urls = self._make(), list[str]()

        def up() -> None:
            if not self._up.done():
                self._up.set_result((urls[0], service))

        def bound(url: str) -> None:
            urls.append(url)
            if not self._until_ready:
                up()

        return await serve(service, on_bound=bound, on_ready=up, stop=self._stop, handle_signals=False)


@contextmanager
def running(make: Callable[[], Service], *, until_ready: bool = True) -> Iterator[Server]:
    """Serve what ``make`` returns inside of the block.

    Args:
        make: makes the service, on the server's thread.
        until_ready: enter the block only when the service is up; else as soon as the socket is bound.

    Raises:
        BaseException: why the service did not come up.
    """
    server = Server(make, until_ready)
    try:
        yield server
    finally:
        server.stop()


def service_for(target: str, *, world_size: int = 2, runner: dict[str, Any] | None = None, **settings: Any) -> Service:
    """Return the service of the worker class ``target`` on CPU ranks.

    Args:
        target: ``module:Class``.
        world_size: ranks.
        runner: further arguments of the runner.
        **settings: further settings; ``port`` is a free one and there is no drain delay unless they say otherwise.
    """
    made = RunnerSettings(**{"target": target, "world_size": world_size, "port": 0, "drain_delay": 0, **settings})
    ranks = DistributedRunner(
        target,
        world_size,
        device="cpu",
        max_queue_depth=made.max_queue_depth,
        hang_timeout=made.hang_timeout,
        timeout=made.collective_timeout,
        cancel_grace=made.cancel_grace,
        restart=made.restart,
        stream_buffer_bytes=made.stream_buffer_bytes,
        **(runner or {}),
    )
    return worker_service(ranks, made)
