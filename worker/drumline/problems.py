"""Errors at the edge: an exception becomes a :class:`Problem`: a status and an ``application/problem+json`` body.

    400 invalid-json            400 bad-request           413 payload-too-large     415 unsupported-media-type
    401 unauthorized            403 forbidden             404 not-found             405 method-not-allowed
    408 body-timeout            422 validation-error      429 queue-full            431 headers-too-large
    499 cancelled               500 worker-error          500 encoding-error        500 internal-error
    503 not-ready               503 draining              503 rank-lost             503 rank-hung
    503 too-many-connections    503 too-many-bytes
    504 request-timeout         504 queue-timeout

``type`` is ``https://drumline.dev/problems/<suffix>`` and never changes its meaning. Every body also has ``title``,
``status``, ``detail``, ``request_id`` and ``error`` (the text once more, under the key that stream readers look for).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from drumline.errors import (
    Draining,
    DrumlineError,
    EncodingError,
    InvalidJson,
    InvalidPayload,
    NotReady,
    QueueFull,
    QueueTimeout,
    RankHung,
    RankLost,
    RequestCancelled,
    RequestTimeout,
    SetupFailed,
    WorkerError,
)

TYPE_PREFIX = "https://drumline.dev/problems/"
CONTENT_TYPE = "application/problem+json"

#: Every problem there is: suffix -> (status, title).
CATALOGUE: dict[str, tuple[int, str]] = {
    "invalid-json": (400, "The request body is not a JSON object"),
    "bad-request": (400, "The request is not HTTP"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden": (403, "This API key may not do that"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "This path does not take that method"),
    "body-timeout": (408, "The request body did not arrive in time"),
    "payload-too-large": (413, "The request body is too large"),
    "unsupported-media-type": (415, "The request body must be JSON"),
    "validation-error": (422, "The request does not fit"),
    "queue-full": (429, "Too many requests are waiting"),
    "headers-too-large": (431, "The request's headers are too large"),
    "cancelled": (499, "The request was cancelled"),
    "worker-error": (500, "The worker raised an exception"),
    "encoding-error": (500, "The result cannot be sent"),
    "internal-error": (500, "The server failed"),
    "too-many-connections": (503, "Too many connections are in use"),
    "too-many-bytes": (503, "Too many request bodies are held"),
    "not-ready": (503, "The app is not ready"),
    "draining": (503, "The app is shutting down"),
    "rank-lost": (503, "A rank was lost"),
    "rank-hung": (503, "A rank made no progress"),
    "request-timeout": (504, "The request took too long"),
    "queue-timeout": (504, "The request waited too long"),
}

#: Seconds for ``Retry-After`` where the error itself has no better idea: another replica, or the restarted group.
_RETRY_AFTER = {
    "queue-full": 1.0,
    "too-many-connections": 1.0,
    "too-many-bytes": 1.0,
    "not-ready": 5.0,
    "draining": 1.0,
    "rank-lost": 1.0,
    "rank-hung": 1.0,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One failure as clients see it.

    Attributes:
        suffix: the last part of ``type``; a key of :data:`CATALOGUE`.
        status: the HTTP status.
        title: one sentence; for ``validation-error`` the summary of ``detail``, else the same for every occurrence.
        detail: what happened this time; for ``validation-error`` a list of ``{"loc", "msg", "type"}`` as FastAPI's.
        request_id: the request's id.
        retry_after: seconds for the ``Retry-After`` header, or None.
        extra: further members of the body (``rank``, ``exception_type``, ``step``, ...).
        extra_headers: further response headers.
    """

    suffix: str
    status: int
    title: str
    detail: str | list[dict[str, Any]]
    request_id: str = ""
    retry_after: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    extra_headers: tuple[tuple[str, str], ...] = ()

    @property
    def type(self) -> str:
        """The stable URI of this kind of problem."""
        return TYPE_PREFIX + self.suffix

    @property
    def text(self) -> str:
        """What happened, as one sentence."""
        return self.detail if isinstance(self.detail, str) else self.title

    def body(self) -> bytes:
        """Return the JSON object, on one line."""
        return _to_json(
            {
                "type": self.type,
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
                "request_id": self.request_id,
                "error": self.text,
                **self.extra,
            }
        )

    def headers(self) -> list[tuple[str, str]]:
        """Return the response headers: content type, and ``Retry-After`` (whole seconds) where a retry makes sense."""
        headers = [("content-type", CONTENT_TYPE)]
        if self.retry_after is not None:
            headers.append(("retry-after", str(max(1, math.ceil(self.retry_after)))))
        headers.extend(self.extra_headers)
        return headers


class ProblemError(Exception):
    """Raised inside the server when a request cannot go on for a reason of the HTTP layer itself."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.text)


def make(
    suffix: str,
    detail: str = "",
    request_id: str = "",
    *,
    retry_after: float | None = None,
    extra: Mapping[str, Any] | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> Problem:
    """Return the problem ``suffix`` of :data:`CATALOGUE`; ``detail`` defaults to its title."""
    status, title = CATALOGUE[suffix]
    return Problem(
        suffix=suffix,
        status=status,
        title=title,
        detail=detail or title + ".",
        request_id=request_id,
        retry_after=retry_after if retry_after is not None else _RETRY_AFTER.get(suffix),
        extra=extra or {},
        extra_headers=tuple(headers),
    )


def validation(detail: Sequence[Mapping[str, Any]], request_id: str = "", title: str = "") -> Problem:
    """Return a ``validation-error`` with FastAPI's ``detail`` list.

    Args:
        detail: one ``{"loc": ["body", "prompt"], "msg": str, "type": str}`` per problem.
        request_id: the request's id.
        title: the sentence; made from ``detail`` when empty.
    """
    items = [dict(item) for item in detail]
    return Problem(
        suffix="validation-error",
        status=422,
        title=title or "; ".join(map(_sentence, items[:3])) + ("; ..." if len(items) > 3 else ""),
        detail=items,
        request_id=request_id,
    )


def from_error(error: BaseException, request_id: str = "", debug: bool = False) -> Problem:
    """Map ``error`` to what a client may know about it.

    Args:
        error: any exception. One that is not drumline's is an ``internal-error`` without its text.
        request_id: the request's id.
        debug: also show tracebacks and stacks, and the text of unknown exceptions.
    """
    if isinstance(error, ProblemError):
        return error.problem
    if isinstance(error, InvalidPayload) and not isinstance(error, InvalidJson):
        return validation(error.detail, request_id, title=str(error))
    suffix = outcome(error)
    if suffix == "internal-error":
        shown = f"{type(error).__name__}: {error}" if debug else "The server failed; its log has more."
        return make(suffix, shown, request_id)
    retry_after = error.retry_after if isinstance(error, NotReady | QueueFull) else None
    return make(suffix, str(error), request_id, retry_after=retry_after, extra=_members(error, debug))


def outcome(error: BaseException | None) -> str:
    """Return the one word for how a request ended: ``ok``, or the suffix of the problem that ``error`` becomes."""
    if error is None:
        return "ok"
    if isinstance(error, ProblemError):
        return error.problem.suffix
    for kind, suffix in _SUFFIXES:
        if isinstance(error, kind):
            return suffix
    # CancelledError, GeneratorExit and KeyboardInterrupt: somebody stopped the request from outside.
    return "internal-error" if isinstance(error, Exception) else "cancelled"


#: Most specific class first.
_SUFFIXES: tuple[tuple[type[DrumlineError], str], ...] = (
    (Draining, "draining"),
    (NotReady, "not-ready"),
    (SetupFailed, "not-ready"),
    (QueueFull, "queue-full"),
    (InvalidJson, "invalid-json"),
    (InvalidPayload, "validation-error"),
    (QueueTimeout, "queue-timeout"),
    (RequestTimeout, "request-timeout"),
    (RequestCancelled, "cancelled"),
    (WorkerError, "worker-error"),
    (EncodingError, "encoding-error"),
    (RankLost, "rank-lost"),
    (RankHung, "rank-hung"),
)


def _members(error: BaseException, debug: bool) -> dict[str, Any]:
    """The error's own attributes, as far as they are known and may be shown."""
    members: dict[str, Any] = {}
    if isinstance(error, WorkerError | SetupFailed):
        members = {"rank": error.rank, "exception_type": error.exception_type, "message": error.message}
        if debug and error.remote_traceback:
            members["traceback"] = error.remote_traceback
    elif isinstance(error, RankLost):
        members = {"rank": error.rank, "exit_code": error.exit_code, "signal": error.signal, "reason": error.reason}
    elif isinstance(error, RankHung):
        members = {"rank": error.rank, "step": error.step}
        if debug and error.stacks:
            members["stacks"] = {str(rank): text for rank, text in error.stacks.items()}
    elif isinstance(error, RequestCancelled):
        members = {"step": error.step}
    elif isinstance(error, NotReady):
        members = {"state": error.state or None}
    return {name: value for name, value in members.items() if value is not None}


def _sentence(item: Mapping[str, Any]) -> str:
    loc = ".".join(str(part) for part in item.get("loc", ()))
    return f"{loc}: {item.get('msg', '')}" if loc else str(item.get("msg", ""))


def _to_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=str)
    except (ValueError, TypeError, OverflowError, RecursionError):
        # A lone surrogate, a huge integer or a strange key in a user's message must not cost the user the message.
        return msgspec.json.encode(_plain(value, 8))


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if depth and isinstance(value, Mapping):
        return {_plain(str(key), 0): _plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    return _plain(str(value), 0)
