"""Dying with one's parent: no rank outlives the nursery, no nursery outlives the runner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ``parent`` ends; exit at once if that has happened already.

    Linux only (``prctl(2)``); elsewhere a thread waits for the parent's end through kqueue.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="drumline-parent").start()
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def watched(control: socket.socket, on_end: Callable[[], None]) -> Iterator[None]:
    """While the main thread is busy (an import may take minutes), a thread notices that the peer of ``control`` is gone.

    It then calls ``on_end`` and exits the process. No such thread is left afterwards.
    """
    stop_read, stop_write = os.pipe()

    def watch() -> None:
        poll = select.poll()
        poll.register(control, 0)  # hang-up only: requests are the main thread's
        poll.register(stop_read, select.POLLIN)
        if any(descriptor == control.fileno() for descriptor, _ in poll.poll()):
            on_end()
            os._exit(0)

    thread = threading.Thread(target=watch, daemon=True, name="drumline-parent")
    thread.start()
    try:
        yield
    finally:
        os.write(stop_write, b"x")
        thread.join()
        os.close(stop_read)
        os.close(stop_write)


def _watch(parent: int) -> None:
    queue = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    event = select.kevent(  # type: ignore[attr-defined,unused-ignore]
        parent,
        select.KQ_FILTER_PROC,  # type: ignore[attr-defined,unused-ignore]
        select.KQ_EV_ADD,  # type: ignore[attr-defined,unused-ignore]
        select.KQ_NOTE_EXIT,  # type: ignore[attr-defined,unused-ignore]
    )
    queue.control([event], 1, None)
    os.killpg(os.getpgrp(), signal.SIGKILL)
