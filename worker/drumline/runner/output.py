"""What ranks print: read from their pipes, cut into lines, logged with rank and request id."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import termios

from drumline.rank_output import LineSplitter, log_rank_line

_CHUNK = 64 << 10
#: Asking how much there is costs a third of a read that fails, and this is asked with every answer of a rank.
_waiting = array.array("i", [0])


class Output:
    """The reading end of one process's output pipe: ``reader``, or that of a new one. ``rank`` is -1 for the nursery."""

    def __init__(self, rank: int, reader: int | None = None) -> None:
        self.rank = rank
        self.request_id = ""
        self._reader, self.writer = os.pipe() if reader is None else (reader, -1)
        os.set_blocking(self._reader, False)
        self._lines = LineSplitter()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reader, self._readable)
        self._open = True

    def release_writer(self) -> None:
        """The process has its copy of the writing end."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def _readable(self) -> None:
        self.drain(closing=True)

    def drain(self, *, closing: bool = False) -> None:
        """Log what has been written so far. ``closing``: also look whether all writers are gone."""
        while self._open:
            fcntl.ioctl(self._reader, termios.FIONREAD, _waiting)
            if not _waiting[0] and not closing:
                return
            try:
                data = os.read(self._reader, _CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self._log(self._lines.feed(data))

    def finish_line(self) -> None:
        """Log what has no line end yet: the request is over, and the rest of the line would be another one's."""
        self._log(self._lines.flush())

    def _log(self, lines: list[bytes]) -> None:
        for line in lines:
            log_rank_line(line, rank=self.rank, request_id=self.request_id)

    def close(self) -> None:
        """Log the rest and close."""
        if not self._open:
            return
        self._open = False
        self._log(self._lines.flush())
        if not self._loop.is_closed():
            self._loop.remove_reader(self._reader)
        os.close(self._reader)
        self.release_writer()
