"""Problems back into exceptions: what :mod:`drumline.problems` turned into a response, the client raises again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from drumline.errors import (
    ConfigurationError,
    ConnectionFailed,
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
from drumline.problems import TYPE_PREFIX

_Body = Mapping[str, Any]
#: What another server, or a proxy in between, means by its status: the suffix of the nearest problem of ours.
_BY_STATUS = {
    400: "validation-error",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "payload-too-large",
    415: "unsupported-media-type",
    422: "validation-error",
    429: "queue-full",
    502: "not-ready",
    503: "not-ready",
    504: "request-timeout",
}
_LONGEST_EXCERPT = 300


def from_response(status: int, headers: Mapping[str, str], body: bytes, url: str) -> DrumlineError:
    """Return the exception that a response of a status from 400 on stands for.

    Args:
        status: the HTTP status.
        headers: of the response; ``Retry-After`` and ``X-Request-Id`` are looked at.
        body: a problem, or whatever another server or a proxy sent.
        url: what was asked, for the message.
    """
    problem = _object(body)
    if not str(problem.get("type", "")).startswith(TYPE_PREFIX):
        problem = _foreign(status, problem, body, url)
    error = from_problem(problem, retry_after=_seconds(headers.get("retry-after")))
    error.request_id = error.request_id or headers.get("x-request-id", "")
    return error


def from_problem(problem: _Body, retry_after: float | None = None) -> DrumlineError:
    """Return the exception that a problem's JSON object stands for; an unknown type is a plain ``DrumlineError``."""
    suffix = str(problem.get("type", "")).removeprefix(TYPE_PREFIX)
    build = BUILDERS.get(suffix, _plain)
    try:
        error = build(problem, retry_after)
    except (TypeError, ValueError, AttributeError):  # a member of a type that ours never has
        error = _plain(problem, retry_after)
    error.request_id = str(problem.get("request_id") or "")
    return error


def _text(body: _Body) -> str:
    detail = body.get("detail")
    return str(body.get("error") or (detail if isinstance(detail, str) else "") or body.get("title") or "failed")


def _plain(body: _Body, _retry_after: float | None) -> DrumlineError:
    return DrumlineError(_text(body))


def _wrong_address(body: _Body, _retry_after: float | None) -> DrumlineError:
    return ConfigurationError(_text(body))


def _invalid(body: _Body, _retry_after: float | None) -> DrumlineError:
    detail = body.get("detail")
    return InvalidPayload(_text(body), detail=detail if isinstance(detail, list) else None)


def _not_ready(body: _Body, retry_after: float | None) -> DrumlineError:
    if "exception_type" in body:
        return _raised(SetupFailed, body)
    return NotReady(_text(body), state=str(body.get("state", "")), retry_after=retry_after)


def _raised(kind: type[SetupFailed] | type[WorkerError], body: _Body) -> DrumlineError:
    return kind(
        str(body.get("message", _text(body))),
        rank=int(body.get("rank", -1)),
        exception_type=str(body.get("exception_type", "")),
        remote_traceback=str(body.get("traceback", "")),
    )


def _rank_lost(body: _Body, _retry_after: float | None) -> DrumlineError:
    return RankLost(
        int(body.get("rank", -1)),
        exit_code=body.get("exit_code"),
        signal=body.get("signal"),
        reason=str(body.get("reason", "")),
        message=_text(body),
    )


def _rank_hung(body: _Body, _retry_after: float | None) -> DrumlineError:
    stacks = {int(rank): str(text) for rank, text in (body.get("stacks") or {}).items()}
    return RankHung(int(body.get("rank", -1)), step=int(body.get("step", 0)), stacks=stacks, message=_text(body))


def _json_position(body: _Body, _retry_after: float | None) -> DrumlineError:
    position = body.get("position")
    return InvalidJson(_text(body), position=position if isinstance(position, int) else None)


def _full(body: _Body, retry_after: float | None) -> DrumlineError:
    return QueueFull(_text(body), retry_after=1.0 if retry_after is None else retry_after)


#: One entry for every problem of ``problems.CATALOGUE``: a test compares the two.
BUILDERS: dict[str, Callable[[_Body, float | None], DrumlineError]] = {
    "bad-request": _plain,
    "invalid-json": _json_position,
    "unauthorized": _wrong_address,
    "forbidden": _wrong_address,
    "not-found": _wrong_address,
    "method-not-allowed": _wrong_address,
    "body-timeout": lambda body, _: ConnectionFailed(_text(body)),
    "payload-too-large": _invalid,
    "unsupported-media-type": _invalid,
    "validation-error": _invalid,
    "queue-full": _full,
    "too-many-connections": _full,
    "too-many-bytes": _full,
    "headers-too-large": _invalid,
    "cancelled": lambda body, _: RequestCancelled(_text(body), step=body.get("step")),
    "worker-error": lambda body, _: _raised(WorkerError, body),
    "encoding-error": lambda body, _: EncodingError(_text(body)),
    "internal-error": _plain,
    "not-ready": _not_ready,
    "draining": lambda body, retry_after: Draining(
        _text(body), state=str(body.get("state", "draining")), retry_after=retry_after
    ),
    "rank-lost": _rank_lost,
    "rank-hung": _rank_hung,
    "request-timeout": lambda body, _: RequestTimeout(_text(body)),
    "queue-timeout": lambda body, _: QueueTimeout(_text(body)),
}


def _foreign(status: int, found: _Body, body: bytes, url: str) -> dict[str, Any]:
    """Our shape for the answer of another server: FastAPI's ``detail``, fal's ``error``, or the first of its text."""
    detail = found.get("detail")
    said = detail if isinstance(detail, str) else found.get("error") or found.get("message") or ""
    if not said and not found:
        said = " ".join(body[:_LONGEST_EXCERPT].decode("utf-8", "replace").split())
    text = f"{url} answered {status}" + (f": {said}" if said else "")
    suffix = _BY_STATUS.get(status, "internal-error")
    return {"type": TYPE_PREFIX + suffix, "error": text, "detail": detail if isinstance(detail, list) else text}


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text) if text else None
    except ValueError:  # a date: too rare to be worth a parser
        return None
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None
