"""Answers of an API server: pages, lines of watches, and errors as the port has them. PURE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import msgspec

from drumline_operator.cluster import ClusterError, Conflict, Expired, Forbidden, Refused, Throttled, Unavailable
from drumline_operator.reflector import Watched


class _ListMeta(msgspec.Struct):
    resourceVersion: str = ""  # noqa: N815 - the API's own names
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Version(msgspec.Struct):
    resourceVersion: str = ""  # noqa: N815


class _Versioned(msgspec.Struct):
    metadata: _Version = msgspec.field(default_factory=_Version)
    code: int = 0
    message: str = ""


class _Line(msgspec.Struct):
    type: str
    object: msgspec.Raw


#: Decodes a page of a list.
listed: Final = msgspec.json.Decoder(_List).decode
_versioned: Final = msgspec.json.Decoder(_Versioned).decode
_line: Final = msgspec.json.Decoder(_Line).decode


def event(text: bytes, path: str) -> Watched:
    """Return one line of a watch.

    Raises:
        Expired, Unavailable: the line tells of an error.
    """
    line = _line(text)
    known = _versioned(line.object)
    if line.type == "ERROR":
        if known.code == 410:
            raise Expired(f"watch {path}: {known.message}")
        raise Unavailable(f"watch {path}: {known.message or known.code}")
    return Watched(line.type, line.object, known.metadata.resourceVersion)


def error(status: int, call: str, data: bytes, headers: Mapping[str, str]) -> ClusterError:
    """Return an answer that is not 2xx as an error of the port."""
    try:
        said = json.loads(data).get("message") or ""
    except (ValueError, AttributeError):
        said = data.decode("utf-8", "replace")[:500]
    words = f"{call}: {said or status}"
    if status in {404, 409}:
        return Conflict(words)
    if status in {401, 403}:
        return Forbidden(words)
    if status == 410:
        return Expired(words)
    if status == 429:
        after = headers.get("Retry-After", "1")
        return Throttled(words, float(after) if after.isdigit() else 1.0)
    # The API server calls a manifest whose fields have the wrong type an error of its own.
    if status in {400, 413, 415, 422} or (status == 500 and "failed to create typed patch object" in said):
        return Refused(said or words)
    return Unavailable(words)
