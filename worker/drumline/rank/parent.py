"""Dying with one's parent: no rank outlives the nursery, no nursery outlives the runner."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

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


def _watch(parent: int) -> None:
    import select

    queue = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    event = select.kevent(  # type: ignore[attr-defined,unused-ignore]
        parent,
        select.KQ_FILTER_PROC,  # type: ignore[attr-defined,unused-ignore]
        select.KQ_EV_ADD,  # type: ignore[attr-defined,unused-ignore]
        select.KQ_NOTE_EXIT,  # type: ignore[attr-defined,unused-ignore]
    )
    queue.control([event], 1, None)
    os.killpg(os.getpgrp(), signal.SIGKILL)
