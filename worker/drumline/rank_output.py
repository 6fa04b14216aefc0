r"""What a rank writes to its output, as log records: plain lines, its own ``logging`` records, progress bars.

Plain output is taken line by line. A record of the rank's ``logging`` arrives as one line too, marked so that its level
and logger survive::

    \x1e{"level":30,"logger":"diffusers"}\tmessage

Line breaks inside such a message travel as ``\x1f``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

LONGEST_LINE = 64 << 10
_MARK = b"\x1e"
_BREAK = "\x1f"
#: Room for the mark and its JSON beside a part of a long message.
_LONGEST_PART = LONGEST_LINE - 1024

_logger = logging.getLogger("drumline.rank")


def rank_handler() -> logging.Handler:
    """Return the handler for a rank's root logger: writes marked lines to the process's stderr."""
    handler = _RankHandler()
    handler.setFormatter(logging.Formatter())
    return handler


def log_rank_line(line: bytes, *, rank: int, request_id: str = "") -> None:
    """Log one line of the output of ``rank``, with the level and logger name that it carries; blank ones are dropped."""
    level, name, text = parse_rank_line(line)
    if not name and not text.strip():
        return
    if _logger.isEnabledFor(level):
        extra: dict[str, Any] = {"rank": rank, "request_id": request_id}
        if name:
            extra["rank_logger"] = name
        _logger.log(level, "%s", text, extra=extra)


def parse_rank_line(line: bytes) -> tuple[int, str, str]:
    r"""Split a line of a rank's output.

    Args:
        line: the line without its ``\n``; bytes that are not UTF-8 are replaced.

    Returns:
        The level (``logging.INFO`` for plain output), the logger's name ("" for plain output) and the text. Of a
        progress bar that repainted its line (``\r``) only the last state is left.
    """
    if line.startswith(_MARK):
        head, tab, message = line[1:].partition(b"\t")
        if tab:
            try:
                fields = json.loads(head)
                level, name = int(fields["level"]), str(fields["logger"])
            except (ValueError, TypeError, KeyError):
                pass
            else:
                return level, name, message.decode("utf-8", "replace").replace(_BREAK, "\n")
    return logging.INFO, "", _last_state(line).decode("utf-8", "replace")


class LineSplitter:
    """Cuts a rank's output stream into lines of at most ``LONGEST_LINE`` bytes.

    A progress bar's unfinished line is kept, its last state only, until the line ends: a thousand repaints are one line
    in the log. Memory is bounded whatever a rank writes.
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; return the lines that are complete, without their line ends."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        parts = [part for line in lines for part in _finished(bytes(line.removesuffix(b"\r")))]
        rest = bytearray(_without_old_states(rest))
        while len(rest) > LONGEST_LINE:
            parts.append(_cut(rest))
        self._rest = rest
        return parts

    def flush(self) -> list[bytes]:
        """Return the unfinished line, if any, and forget it: the stream ended or the request is over."""
        if not self._rest:
            return []
        rest, self._rest = self._rest, bytearray()
        return [part for part in _parts(_last_state(bytes(rest))) if part]


class _RankHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            head = json.dumps({"level": record.levelno, "logger": record.name}, separators=(",", ":"))
            text = self.format(record).replace(_BREAK, " ").replace("\r", " ").replace("\n", _BREAK)
            body = text.encode("utf-8", "replace")
            prefix = _MARK + head.encode()[:_LONGEST_PART] + b"\t"
            lines = b"".join(prefix + part + b"\n" for part in _parts(body, _LONGEST_PART))
            sys.stderr.flush()
            # Straight to the descriptor: the text layer's buffer may be in the middle of somebody's unfinished line.
            view = memoryview(lines)
            while view:
                view = view[os.write(2, view) :]
        except Exception:  # a log line must never break what it tells about
            self.handleError(record)


def _finished(line: bytes) -> list[bytes]:
    """A whole line, cut to size; a log record that was written into somebody's unfinished line gets its own."""
    start = line.find(_MARK, 1)
    if start < 0:
        return _parts(line)
    return [*(part for part in _parts(line[:start]) if part.strip()), *_finished(line[start:])]


def _without_old_states(line: bytes | bytearray) -> bytes | bytearray:
    r"""Drop what a later ``\r`` will paint over; the newest finished state stays, for a stream that ends here."""
    last = line.rfind(b"\r")
    if last < 0:
        return line
    before = line.rfind(b"\r", 0, last)
    return line[before + 1 :]


def _last_state(line: bytes) -> bytes:
    if b"\r" not in line:
        return line
    return next((state for state in reversed(line.split(b"\r")) if state.strip()), b"")


def _parts(line: bytes | bytearray, limit: int = LONGEST_LINE) -> list[bytes]:
    if not line.startswith(_MARK):
        line = _last_state(bytes(line))
    rest, parts = bytearray(line), []
    while len(rest) > limit:
        parts.append(_cut(rest, limit))
    return [*parts, bytes(rest)]


def _cut(rest: bytearray, limit: int = LONGEST_LINE) -> bytes:
    """Take up to ``limit`` bytes off the front, never in the middle of a UTF-8 character."""
    end = limit
    while end > limit - 4 and rest[end] & 0xC0 == 0x80:
        end -= 1
    part = bytes(rest[:end])
    del rest[:end]
    return part
