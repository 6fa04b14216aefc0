"""Strict readers of what the server sends: problems and event streams, exactly as the contract has them."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2

from drumline.problems import CATALOGUE, TYPE_PREFIX

_FRAME = re.compile(r"event: (update|result|error)\nid: (\d+)\ndata: ([^\n]*)")


def problem_of(answer: httpx2.Response, suffix: str) -> dict[str, Any]:
    """Return the body of a problem after looking at everything that every problem has.

    Args:
        answer: the response.
        suffix: the last part of the problem's type.
    """
    status = CATALOGUE[suffix][0]
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"]) == (TYPE_PREFIX + suffix, status), body
    assert body["request_id"] == answer.headers["x-request-id"], body
    assert body["title"], body
    assert body["error"], body
    assert "traceback" not in body, body
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return body


def events_of(text: str) -> list[tuple[str, int, Any]]:
    """Return ``(name, id, data)`` of every event; anything but the contract's frames is an error."""
    found = []
    assert text.endswith("\n\n"), text[-200:]
    for block in text[:-2].split("\n\n"):
        if block == ": ping":
            continue
        frame = _FRAME.fullmatch(block)
        assert frame, block[:200]
        found.append((frame[1], int(frame[2]), json.loads(frame[3])))
    assert [event[1] for event in found] == list(range(len(found)))
    assert all(event[0] == "update" for event in found[:-1])
    assert found[-1][0] != "update"
    return found


def metric_of(text: str, name: str) -> float:
    """Return the value of metric ``name`` (with its labels) in Prometheus' text; 0 when it is not there."""
    found = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0
