"""From a bare process to a serving rank: output pipe, stacks on demand, process group, ``setup()``, loop."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import inspect
import logging
import os
import signal
import socket
import sys
import time
from typing import Any

from drumline import codec, protocol
from drumline.nursery_protocol import RankConfig
from drumline.page import Page
from drumline.rank import group
from drumline.rank.failures import describe
from drumline.rank.link import Link, LocalLink
from drumline.rank.loop import RankLoop
from drumline.signature import request_model
from drumline.worker import DistributedWorker

_IOLBF = 1  # line buffered, on glibc, musl and macOS
#: Exit code of a rank whose ``setup()`` raised; the exception itself has been sent.
EXIT_SETUP_FAILED = 3


def run_rank(config: RankConfig, fds: list[int], worker_class: type) -> None:
    """Be rank ``config.rank`` until teardown or the runner's end; never returns.

    Args:
        config: what to be.
        fds: channel (unless the channel has an address), shared page, output pipe, stacks pipe.
        worker_class: a subclass of ``DistributedWorker``.
    """
    code = 1
    try:
        code = _run(config, fds, worker_class)
    finally:
        # No interpreter shutdown: destructors of half a machine learning stack may hang or crash; the GPU is freed anyway.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # user code may have replaced or closed them
                stream.flush()
        os._exit(code)


def _run(config: RankConfig, fds: list[int], worker_class: type) -> int:
    *channel, page_fd, output, stacks = fds
    _prepare(output, stacks)
    page = Page(page_fd, config.world_size)
    os.close(page_fd)
    link = _link(config, channel)
    try:
        return _serve(config, link, page, worker_class)
    finally:
        if not channel:
            link.close()  # sends what waits in this process; with a socket pair the kernel has it already


def _serve(config: RankConfig, link: Link, page: Page, worker_class: type) -> int:
    page.beat(config.rank)
    loop = RankLoop(link, page, config.rank)
    began = time.monotonic()
    try:
        data, buffers = link.receive()
    except EOFError:
        return 0
    try:
        message = protocol.decode_runner_message(data)
        assert isinstance(message, protocol.Setup)
        device, backend = group.join(config)
        worker = construct(worker_class, config)
        worker.device = device
        model = request_model(worker_class)
        loop.attach(worker, model.bind, takes_streaming=model.takes_streaming, collectives=group.collectives())
        loop.run_user(worker.setup, **codec.unpack(message.kwargs, buffers))
        if message.warmup:
            loop.warm_up(codec.unpack(message.warmup, []))
        del buffers, message
    except BaseException as error:  # user code may raise anything
        failure = describe(error)
        sys.stderr.write(failure.traceback)
        sys.stderr.flush()
        link.send(protocol.encode(protocol.SetupRaised(failure)))
        return EXIT_SETUP_FAILED
    link.send(protocol.encode(protocol.Ready(time.monotonic() - began, str(device), backend)))
    loop.serve()
    group.leave()
    return 0


def _prepare(output: int, stacks: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)
    os.close(output)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    os.set_inheritable(stacks, False)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=2)
    _line_buffer_c_stdout()
    _configure_logging()


def _line_buffer_c_stdout() -> None:
    """Libraries in C print through stdio, which would keep lines for a pipe until there are 4096 bytes of them."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError, ValueError):
        stdout = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        libc.setvbuf(stdout, None, _IOLBF, ctypes.c_size_t(0))


def _configure_logging() -> None:
    from drumline.rank_output import rank_handler

    root = logging.getLogger()
    root.handlers[:] = [rank_handler()]
    if root.level in (logging.NOTSET, logging.WARNING):
        root.setLevel(logging.INFO)
    logging.getLogger("drumline.worker").setLevel(logging.DEBUG)  # rank_print(debug=True): the runner's level decides
    logging.captureWarnings(False)


def _link(config: RankConfig, channel: list[int]) -> Link:
    if channel:
        return LocalLink(socket.socket(fileno=channel[0]))
    from drumline.rank.remote import RemoteLink

    return RemoteLink(config)


def construct(worker_class: Any, config: RankConfig) -> DistributedWorker:
    """Build the worker; its ``__init__`` may take ``(rank, world_size)`` like the base class, or nothing."""
    worker: DistributedWorker = worker_class.__new__(worker_class)
    worker.rank, worker.world_size = config.rank, config.world_size
    parameters = list(inspect.signature(worker_class.__init__).parameters.values())[1:]
    takes_two = len(parameters) >= 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
    worker_class.__init__(worker, *((config.rank, config.world_size) if takes_two else ()))
    worker.rank, worker.world_size = config.rank, config.world_size
    return worker
