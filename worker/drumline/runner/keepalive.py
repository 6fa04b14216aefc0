"""Runs something when nothing else happened for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from drumline.errors import DrumlineError

log = logging.getLogger("drumline.runner")


class Keepalive:
    """Call ``run`` after every ``interval`` seconds without :meth:`postpone`; its errors are logged, it goes on."""

    def __init__(self, interval: float, run: Callable[[], None]) -> None:
        self._interval = interval
        self._run = run
        self._timer: asyncio.TimerHandle
        self._arm()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._fire)

    def postpone(self) -> None:
        """Something happened: begin to count anew."""
        self._timer.cancel()
        self._arm()

    def _fire(self) -> None:
        self._arm()
        try:
            self._run()
        except DrumlineError as error:
            log.warning("keep-alive request: %s", error)

    def cancel(self) -> None:
        """Stop."""
        self._timer.cancel()
