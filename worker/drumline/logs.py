"""Logs: short coloured lines for people on a terminal, one JSON object per line in a container.

    12:03:04.120 warning rank 1 4f1c2a90  half of the prompt was cut      people, on stderr
    {"time":"2031-05-04T12:03:04.120Z","level":"warning",...}             programs, on stdout

Every record may carry ``rank`` and ``request_id`` (through ``extra``), and a mapping ``fields`` that JSON lines get as
members. What ranks print reaches the logger ``drumline.rank``; the one access line per request comes from
``drumline.access`` with everything measured in ``extra`` (times in seconds). How bytes from a rank become such records is in
:mod:`drumline.rank_output`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import msgspec

from drumline.rank_output import LineSplitter, log_rank_line, parse_rank_line, rank_handler

__all__ = [
    "JsonFormatter",
    "LineSplitter",
    "LogFormat",
    "LogLevel",
    "PeopleFormatter",
    "configure",
    "ensure_handler",
    "log_rank_line",
    "parse_rank_line",
    "rank_handler",
    "shows_text",
    "wants_colour",
]

LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

#: Attributes that every record has; whatever else a record carries came in through ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_KNOWN = _STANDARD | {"rank", "request_id", "rank_logger", "fields"}
#: Libraries that tell too much below "warning"; asked for by name they still speak.
_CHATTY = ("asyncio", "httpcore2", "httpx2", "PIL", "watchfiles", "multipart")
_COLOURS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
_SGR = re.compile(r"\x1b\[[0-9;]*m")
#: Every other control sequence: cursor moves and the like, which would repaint somebody else's line.
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-ln-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\^_]|\x1b(?!\[[0-9;]*m)"
    r"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]"
)
_encode = msgspec.json.Encoder(enc_hook=str).encode
_attach = threading.Lock()


def configure(format: LogFormat = "auto", level: LogLevel = "info") -> None:
    """Send all logs of this process to one place; replaces the root logger's handlers.

    Args:
        format: ``text`` for people (stderr), ``json`` for programs (stdout), ``auto``: text when stderr is a terminal.
        level: the lowest level shown.
    """
    for_people = shows_text(format)
    handler = _Handler("stderr") if for_people else _Handler("stdout")
    handler.setFormatter(PeopleFormatter() if for_people else JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    lowest = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(lowest)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(lowest, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "drumline"):
        routed = logging.getLogger(name)
        for old in routed.handlers[:]:
            routed.removeHandler(old)
        routed.propagate = True
        routed.setLevel(logging.NOTSET)
    # drumline.access has one line per request; uvicorn's own would be a second one that knows less.
    logging.getLogger("uvicorn.access").propagate = False
    logging.captureWarnings(True)


def shows_text(format: LogFormat) -> bool:
    """Whether :func:`configure` with this format writes for people."""
    return _is_terminal(sys.stderr) if format == "auto" else format == "text"


def ensure_handler() -> None:
    """Show drumline's records on stderr when the program that uses it has set up no logging at all.

    Without this the first sight of a failing rank would be an exception without its output. A handler that the program
    adds to the root logger later takes over.
    """
    logger = logging.getLogger("drumline")
    with _attach:
        if logger.hasHandlers():
            return
        logger.addHandler(_StandIn(logger))


class PeopleFormatter(logging.Formatter):
    """``12:03:04.120 warning rank 1 4f1c2a90  message``: the level unless it is info, rank and request id if known.

    Args:
        colour: use ANSI colours; None: only when stderr is a terminal and ``NO_COLOR`` is not set.
    """

    def __init__(self, colour: bool | None = None) -> None:
        super().__init__()
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines; each line of a rank has the whole head."""
        colour = wants_colour(sys.stderr) if self.colour is None else self.colour
        text = record.getMessage()
        if record.name == "drumline.access":
            text += _waits(record)
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        text = "\n".join(part for part in (text, record.exc_text, record.stack_info) if part)
        text = _CONTROL.sub("", text)
        if not colour:
            text = _SGR.sub("", text)
        elif "\x1b" in text:
            text += "\x1b[0m"
        head = self._head(record, colour)
        if getattr(record, "rank", None) is not None:
            return "\n".join(f"{head}  {line}" for line in text.split("\n"))
        return f"{head}  {text}"

    def _head(self, record: logging.LogRecord, colour: bool) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone()
        parts = [_painted(f"{moment:%H:%M:%S}.{int(record.msecs):03d}", "2", colour)]
        if record.levelno != logging.INFO:
            parts.append(_painted(record.levelname.lower(), _COLOURS.get(record.levelno, ""), colour))
        rank = getattr(record, "rank", None)
        if rank is not None:
            # Before there are ranks, their parent imports the worker's module.
            words = "import" if rank == -1 else f"rank {rank}"
            parts.append(_painted(words, str(31 + (rank + 4) % 6) if isinstance(rank, int) else "36", colour))
        request_id = getattr(record, "request_id", "") or _fields(record).get("request_id")
        if request_id:
            parts.append(_painted(_CONTROL.sub("", str(request_id))[:8], "2", colour))
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (RFC 3339, UTC), level, logger, message, rank, request_id, extra, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of strict JSON, whatever its fields hold."""
        message = record.getMessage()
        if not message.isprintable():  # else there is nothing to take out, which is quicker to see
            message = _SGR.sub("", _CONTROL.sub("", message))
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.created * 1000) % 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": getattr(record, "rank_logger", "") or record.name,
            "message": message,
        }
        for name in ("rank", "request_id"):
            value = getattr(record, name, None)
            if value not in (None, ""):
                line[name] = value
        for name, value in _fields(record).items():
            if value is not None:
                line.setdefault(str(name), value)
        for name, value in vars(record).items():
            if name not in _KNOWN and value is not None:
                line.setdefault(name, value)
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return _encode(line).decode()
        except (ValueError, TypeError, RecursionError):  # a lone surrogate, an odd key, an integer without end
            plain = {name: value if isinstance(value, str | int) else str(value) for name, value in line.items()}
            return json.dumps(plain, separators=(",", ":"))


def wants_colour(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``stream`` is a terminal that shows colours and nobody has asked for none (``NO_COLOR``)."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb" and _is_terminal(stream)


class _Handler(logging.Handler):
    """Writes to what ``sys.stdout`` or ``sys.stderr`` is at that moment: a progress bar may have replaced it."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._stream = name

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record) + "\n"
            stream: TextIO | None = getattr(sys, self._stream)
            if stream is None:
                return
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
            stream.flush()
        except BrokenPipeError:
            pass  # whoever read the logs is gone; the work goes on
        except Exception:  # a log line must never break what it tells about
            self.handleError(record)


class _StandIn(_Handler):
    """The handler of a program without logging; leaves as soon as the program has a handler of its own."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__("stderr")
        self._logger = logger
        self._had_level = logger.level
        self.setFormatter(PeopleFormatter())
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)
            return
        self._logger.removeHandler(self)
        self._logger.setLevel(self._had_level)


@functools.lru_cache(maxsize=4)
def _second(created: int) -> str:
    return f"{datetime.fromtimestamp(created, UTC):%Y-%m-%dT%H:%M:%S}"


def _fields(record: logging.LogRecord) -> Mapping[Any, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _waits(record: logging.LogRecord) -> str:
    """The times of an access line, for people: how long the request waited and ran, else how long it took."""
    named = (("queue_wait", "waited"), ("run_time", "ran"))
    times = [(label, seconds) for name, label in named if (seconds := getattr(record, name, None)) is not None]
    if not times and (seconds := getattr(record, "duration", None)) is not None:
        times = [("took", seconds)]
    parts = [f"{label} {seconds * 1e3:.1f} ms" for label, seconds in times if isinstance(seconds, int | float)]
    return f" ({', '.join(parts)})" if parts else ""


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):  # closed, or not a real file
        return False
