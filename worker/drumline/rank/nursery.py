"""The nursery: parent of all ranks. It imports torch and the user's module once, then forks ranks in milliseconds.

It runs no user code but imports, never touches CUDA, has one thread, and ends with the runner: EOF on its control
socket kills every rank. Where forking is not safe (importing the module initialised CUDA, or macOS) it starts fresh
interpreters instead and says why.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import warnings

import msgspec

from drumline import descriptors, framing
from drumline import nursery_protocol as wire
from drumline.page import create_file
from drumline.rank.failures import describe
from drumline.rank.parent import die_with, watched

_CHUNK = 64 << 10


class Nursery:
    """Serve one runner over ``control`` until it is gone."""

    def __init__(self, control: socket.socket, private_directory: str) -> None:
        self._control = control
        self._private = private_directory
        self._ranks: dict[int, tuple[int, int]] = {}  # pid -> (incarnation, rank)
        self._method = "fork"
        self._worker_class: type | None = None

    def run(self) -> None:
        """Handle requests and children until EOF."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._own = (wake_read, wake_write)
        reader = framing.FrameReader()
        fds: list[int] = []
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self._reap()
                if self._control.fileno() in ready and not self._serve(reader, fds):
                    break
        self._end()

    def _serve(self, reader: framing.FrameReader, fds: list[int]) -> bool:
        try:
            data, ancillary, _, _ = self._control.recvmsg(_CHUNK, descriptors.ANCILLARY)
        except OSError:
            return False
        fds += descriptors.received(ancillary)
        if not data:
            return False
        for _, message in reader.feed(memoryview(data)):
            request = wire.decode_request(message)
            match request:
                case wire.Preload():
                    with watched(self._control, self._remove_directory):
                        report = self._preload(request)
                    self._report(report)
                case wire.Spawn():
                    count = 4 if request.has_channel else 3
                    mine, fds[:] = fds[:count], fds[count:]
                    self._spawn(request, mine)
                case wire.Signal():
                    self._signal(request)
        return True

    def _report(self, report: wire.NurseryReport) -> None:
        message = wire.encode(report)
        with contextlib.suppress(OSError):
            self._control.sendall(framing.PREFIX.pack(len(message), 0) + message)

    # -- preload

    def _preload(self, request: wire.Preload) -> wire.NurseryReport:
        began = time.monotonic()
        sys.path[:] = request.path
        try:
            os.chdir(request.cwd)
            import torch

            import drumline.rank.main  # noqa: F401  # with torch.distributed; forked ranks find it imported
            from drumline import targets
            from drumline.app_kind import kind_of

            cls = targets.resolve(request.reference)
            kind = kind_of(cls)
            schema = doc = ""
            if kind == "worker":
                from drumline.signature import request_model

                schema = msgspec.json.encode(request_model(cls).json_schema()).decode()
                doc = (cls.__doc__ or "").strip()
            self._worker_class = cls
            reference = targets.class_reference(cls)
        except BaseException as error:  # a module may raise anything, SystemExit included
            return wire.PreloadFailed(describe(error))
        method, reason = request.method, "asked for"
        if method == "auto":
            method, reason = "fork", "default"
            if sys.platform == "darwin":
                method, reason = "spawn", "forking after imports is not safe on macOS"
            elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                method, reason = "spawn", f"importing {request.reference} initialised CUDA"
        self._method = method
        gc.collect()
        gc.freeze()  # keep the collector from touching, and so copying, the pages that ranks share
        return wire.Preloaded(kind, reference, schema.encode(), method, reason, time.monotonic() - began, doc)

    # -- ranks

    def _spawn(self, request: wire.Spawn, fds: list[int]) -> None:
        config = request.config
        pid = self._fork(config, fds) if self._method == "fork" else self._execute(config, fds)
        self._ranks[pid] = (request.incarnation, config.rank)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        for descriptor in fds:
            os.close(descriptor)
        self._report(wire.Spawned(request.incarnation, config.rank, pid))

    def _fork(self, config: wire.RankConfig, fds: list[int]) -> int:
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns when other threads exist; a BLAS library's idle pool is common and handles fork itself.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            return pid
        try:
            die_with(parent)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            self._selector.close()
            for descriptor in self._own:
                os.close(descriptor)
            self._control.close()
            from drumline.rank.main import run_rank

            assert self._worker_class is not None
            run_rank(config, fds, self._worker_class)
        finally:
            os._exit(1)

    def _execute(self, config: wire.RankConfig, fds: list[int]) -> int:
        text = msgspec.json.encode({"config": config, "fds": fds, "path": sys.path})
        # In a file without a name: everybody on this machine may read a command line, and these hold a secret key.
        settings = create_file("settings", len(text))
        try:
            os.pwrite(settings, text, 0)
            for descriptor in (settings, *fds):
                os.set_inheritable(descriptor, True)
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "drumline.rank", str(settings)],
                os.environ | {"DRUMLINE_PARENT": str(os.getpid())},
            )
        finally:
            os.close(settings)

    def _signal(self, request: wire.Signal) -> None:
        for pid, (incarnation, _) in list(self._ranks.items()):
            if incarnation == request.incarnation:
                self._kill(pid, request.signal)

    def _kill(self, pid: int, number: int) -> None:
        # A rank may have children (data loaders): its whole process group goes.
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._ranks:
                continue
            incarnation, rank = self._ranks[pid]
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self._report(wire.Paused(incarnation, rank, os.WIFSTOPPED(status)))
                continue
            del self._ranks[pid]
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # its children must not keep a GPU
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            self._report(wire.Exited(incarnation, rank, code, number))

    def _end(self) -> None:
        for pid in list(self._ranks):
            self._kill(pid, signal.SIGKILL)
        for pid in list(self._ranks):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._remove_directory()

    def _remove_directory(self) -> None:
        shutil.rmtree(self._private, ignore_errors=True)


def main(arguments: list[str]) -> None:
    """Entry: control socket's descriptor, private directory."""
    control = socket.socket(fileno=int(arguments[0]))
    try:
        Nursery(control, arguments[1]).run()
    finally:
        os._exit(0)  # nothing to tidy up but a large interpreter, for which somebody would wait


if __name__ == "__main__":
    main(sys.argv[1:])
