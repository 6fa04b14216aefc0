"""The nursery's process with our ends of its socket and output; a command may start it before anything else is there.

So importing this module loads no pydantic: that takes longer than all else until the process is started.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass

from drumline import framing
from drumline import nursery_protocol as wire

#: Variables for the server alone: ranks, and what they start, never have them.
SERVER_SECRETS = frozenset({"DRUMLINE_API_KEYS"})
#: The nursery has nothing to do at the end but to kill ranks and go.
GOODBYE_SECONDS = 5.0


@dataclass(frozen=True)
class Asked:
    """What a nursery is to import, from which working directory, and how it is to start ranks; a runner's own defaults."""

    reference: str
    cwd: str | None = None
    method: str = "auto"


class NurseryProcess:
    """Starts the process, and tells it what to import. Needs no event loop.

    Args:
        asked: what it is told.
        directory: private to it and its ranks; it removes it when this process dies first.

    Attributes:
        control: our end of its socket.
        output: reads what it and what it starts print.
        process: itself.
    """

    def __init__(self, asked: Asked, directory: str) -> None:
        self.asked, self.directory = asked, directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.control, theirs = socket.socketpair()
        self.output, writer = os.pipe()
        interpreter = [sys.executable, *_interpreter_flags()]
        try:
            with theirs:
                self.process = subprocess.Popen(  # noqa: S603
                    [*interpreter, "-m", "drumline.rank.nursery", str(theirs.fileno()), directory],
                    stdin=subprocess.DEVNULL,
                    stdout=writer,
                    stderr=writer,
                    pass_fds=(theirs.fileno(),),
                    cwd=asked.cwd,
                    env=_environment(),
                    start_new_session=True,
                )
        except BaseException:
            self.control.close()
            os.close(self.output)
            raise
        finally:
            os.close(writer)
        self.control.setblocking(False)
        path = [entry or os.getcwd() for entry in sys.path]
        self.send(wire.Preload(asked.reference, path, asked.cwd or os.getcwd(), asked.method))

    def send(self, request: wire.RunnerRequest, fds: tuple[int, ...] = ()) -> None:
        """Send a request, with copies of descriptors; one that is gone hears nothing."""
        message = wire.encode(request)
        frame = framing.PREFIX.pack(len(message), 0) + message
        # Requests are rare and small: the socket buffer takes them whole while the nursery imports.
        with suppress(BrokenPipeError, ConnectionError):
            if fds:
                socket.send_fds(self.control, [frame], fds)
            else:
                self.control.send(frame)

    def kill(self) -> None:
        """Kill it at once; ranks die with their parent."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)

    def reap(self) -> None:
        """Wait until it has ended, which it does when ``control`` is closed; not for long."""
        try:
            self.process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()


_early: dict[Asked, NurseryProcess] = {}


def start_early(asked: Asked) -> None:
    """Let a nursery import what a runner will ask for, while this process still imports its server.

    The first runner that asks for the same takes it over (:func:`directory_for`); without one it ends with this process.
    Where no process can be started, nothing happens: the runner tries again, and tells.
    """
    if asked in _early:
        return
    with suppress(OSError):
        directory = tempfile.mkdtemp(prefix="drumline-")
        try:
            _early[asked] = early = NurseryProcess(asked, directory)
        except BaseException:  # Ctrl-C, too
            shutil.rmtree(directory, ignore_errors=True)
            raise
        atexit.register(_discard, early)


def directory_for(asked: Asked) -> str:
    """Return a private directory for a new nursery: a new one, or that of a nursery that was started early for it."""
    return _early[asked].directory if asked in _early else tempfile.mkdtemp(prefix="drumline-")


def started(asked: Asked, directory: str) -> NurseryProcess:
    """Return the nursery of that directory that was started early, or start one."""
    if asked in _early and _early[asked].directory == directory:
        return _early.pop(asked)
    return NurseryProcess(asked, directory)


def _discard(early: NurseryProcess) -> None:
    if _early.pop(early.asked, None) is early:
        early.control.close()
        early.kill()  # it has no ranks, and may be in the middle of an import: nobody should wait for the end of that
        early.reap()
        os.close(early.output)
        shutil.rmtree(early.directory, ignore_errors=True)


def _interpreter_flags() -> list[str]:
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    # The user's own modules decide about warnings in their ranks; -W error of a test run must not kill an import.
    return [flag for flag in flags if not flag.startswith("-W")]


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in SERVER_SECRETS}
    # Asking NVML instead of the driver keeps the nursery free of a CUDA context, which a forked rank could not use.
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return environment
