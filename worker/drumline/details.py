"""What is wrong with an input, as data: FastAPI-shaped details and near misses of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from drumline.errors import InvalidPayload


def problem(loc: list[str | int], message: str, kind: str) -> dict[str, Any]:
    """One detail: where (``["body", name, ...]``), what in words, and pydantic's name for that kind of problem."""
    return {"loc": loc, "msg": message, "type": kind}


def unknown_name(name: str, known: Iterable[str]) -> dict[str, Any]:
    """The detail for a key that nobody takes, with the nearest name that is taken."""
    return problem(["body", name], f"Extra inputs are not permitted{did_you_mean(name, known)}", "extra_forbidden")


def invalid(details: list[dict[str, Any]]) -> InvalidPayload:
    """All details as one error; its text names every field."""
    text = "; ".join(f"{'.'.join(map(str, d['loc'][1:])) or 'body'}: {d['msg']}" for d in details)
    return InvalidPayload(text, detail=details)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'prompt'?`` for the nearest known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
