"""Every error that drumline raises on purpose, on one screen.

    DrumlineError
    ├── ConfigurationError         a target, manifest or setting is wrong (names the field and the cure)
    ├── SetupFailed                setup() raised on a rank
    ├── NotReady                   the group is not (or no longer) serving
    │   └── Draining               ... because it is shutting down
    ├── QueueFull                  too many requests wait already
    ├── InvalidPayload             the request's payload cannot be used (names the field)
    │   └── InvalidJson            ... because the body is not a JSON object (says where)
    ├── EncodingError              a result that the wire or JSON cannot carry (names the place)
    ├── RequestTimeout             the deadline passed while the request ran          (also a TimeoutError)
    │   └── QueueTimeout           ... while it still waited
    ├── RequestCancelled           somebody cancelled the request
    ├── WorkerError                user code raised on a rank
    ├── RankLost                   a rank's process ended
    ├── RankHung                   a rank stopped making progress
    └── ConnectionFailed           drumline.client: no server there, or the connection broke    (also a ConnectionError)

Errors are data: nothing here knows an HTTP status (``drumline.problems`` maps them at the edge).
"""

from __future__ import annotations

import signal as _signal
from typing import Any


class DrumlineError(Exception):
    """Base of every error of drumline.

    Attributes:
        request_id: the request that failed, as far as known; ``drumline.client`` sets it.
    """

    request_id: str = ""


class ConfigurationError(DrumlineError):
    """A target, manifest, option or environment variable is wrong; the message names it and the cure."""


class _RemoteError(DrumlineError):
    """An exception that user code raised in a rank process, carried over as text."""

    def __init__(self, message: str, *, rank: int, exception_type: str = "", remote_traceback: str = "") -> None:
        self.rank = rank
        self.exception_type = exception_type
        self.message = message
        self.remote_traceback = remote_traceback
        super().__init__(message)

    def __str__(self) -> str:
        where = f"rank {self.rank}: " if self.rank >= 0 else ""
        kind = f"{self.exception_type}: " if self.exception_type else ""
        return f"{where}{kind}{self.message}"


class SetupFailed(_RemoteError):
    """``setup()`` (or loading the worker class) failed on ``rank``.

    Attributes:
        rank: the first rank that failed; -1 when the worker's module could not be imported at all.
        exception_type: qualified name of the user's exception.
        message: its text.
        remote_traceback: the formatted traceback of that rank.
    """


class WorkerError(_RemoteError):
    """``__call__`` (or ``teardown()``) raised on ``rank``; attributes as in :class:`SetupFailed`."""


class NotReady(DrumlineError):
    """The group cannot take requests now.

    Attributes:
        state: the runner's state (``starting``, ``restarting``, ``failed``, ...).
        retry_after: seconds after which a new try makes sense, or None when it makes none.
        failure: the ``lastFailure`` of ``/status`` that it comes from, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        state: str = "",
        retry_after: float | None = None,
        failure: dict[str, Any] | None = None,
    ) -> None:
        self.state = state
        self.retry_after = retry_after
        self.failure = failure
        super().__init__(message)


class Draining(NotReady):
    """The process is shutting down and takes no new requests."""


class QueueFull(DrumlineError):
    """``depth`` requests wait already, which is the limit; try again in ``retry_after`` seconds."""

    def __init__(self, message: str, *, depth: int = 0, retry_after: float = 1.0) -> None:
        self.depth = depth
        self.retry_after = retry_after
        super().__init__(message)


class InvalidPayload(DrumlineError):
    """The payload does not fit the worker.

    Attributes:
        detail: one ``{"loc": [...], "msg": str, "type": str}`` per problem, in FastAPI's shape.
    """

    def __init__(self, message: str, *, detail: list[dict[str, Any]] | None = None) -> None:
        self.detail = detail or [{"loc": ["body"], "msg": message, "type": "value_error"}]
        super().__init__(message)


class InvalidJson(InvalidPayload):
    """The request's body is not a strict JSON object.

    Attributes:
        position: byte of the body at which reading stopped, or None when no single byte is to blame.
    """

    def __init__(self, message: str, *, position: int | None = None) -> None:
        self.position = position
        loc: list[Any] = ["body"] if position is None else ["body", position]
        super().__init__(message, detail=[{"loc": loc, "msg": message, "type": "json_invalid"}])


class EncodingError(DrumlineError):
    """A value that cannot be carried; the message holds its path (``result.images[2]``) and type."""


class RequestTimeout(DrumlineError, TimeoutError):
    """The request's deadline passed; the ranks were told to stop."""


class QueueTimeout(RequestTimeout):
    """The request's deadline passed before a rank had seen it."""


class RequestCancelled(DrumlineError):
    """The request was cancelled (by its caller, a client that went away, or the cancel route).

    Attributes:
        step: the step at which all ranks stopped, when the worker uses ``checkpoint()``.
    """

    def __init__(self, message: str = "the request was cancelled", *, step: int | None = None) -> None:
        self.step = step
        super().__init__(message)


class RankLost(DrumlineError):
    """The process of ``rank`` ended.

    Attributes:
        rank: the rank that ended first (-1: all of them, because their parent process ended).
        exit_code: its exit status, or None when a signal ended it.
        signal: the signal's number, or None.
        reason: a short CamelCase word (``Exited``, ``Killed``, ``OutOfMemory``, ``Desynchronised``, ...).
    """

    def __init__(
        self, rank: int, *, exit_code: int | None = None, signal: int | None = None, reason: str = "", message: str = ""
    ) -> None:
        self.rank = rank
        self.exit_code = exit_code
        self.signal = signal
        self.reason = reason or ("Killed" if signal is not None else "Exited")
        super().__init__(message or f"rank {rank} was lost: {describe_exit(exit_code, signal)}")


class RankHung(DrumlineError):
    """``rank`` made no progress for the hang time-out.

    Attributes:
        rank: the rank that is behind the others.
        step: the last step it reported (0 when the worker has no ``checkpoint()``).
        stacks: formatted thread stacks per rank, as far as they could be collected.
    """

    def __init__(self, rank: int, *, step: int = 0, stacks: dict[int, str] | None = None, message: str = "") -> None:
        self.rank = rank
        self.step = step
        self.stacks = stacks or {}
        super().__init__(message or f"rank {rank} made no progress (last step {step})")


class ConnectionFailed(DrumlineError, ConnectionError):
    """The server cannot be reached, or the connection ended before the answer did.

    Attributes:
        sent: True when the request may have reached the server, so that trying again may run it twice.
    """

    def __init__(self, message: str, *, sent: bool = False) -> None:
        self.sent = sent
        super().__init__(message)


def describe_exit(exit_code: int | None, signal: int | None) -> str:
    """Words for an exit status: ``killed by SIGKILL``, ``exited with code 1``."""
    if signal is not None:
        try:
            return f"killed by {_signal.Signals(signal).name}"
        except ValueError:
            return f"killed by signal {signal}"
    if exit_code is not None:
        return f"exited with code {exit_code}"
    return "connection closed"
