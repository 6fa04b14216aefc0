"""What may come back: the model beside the real system. PURE: a request, what its client saw, and the verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

#: Every secret looks like this, so that a foreign one is found wherever it lies.
SECRET: Final = re.compile(r"secret-[0-9a-f]{16}")

#: How a request may end that was neither cancelled nor wrong, while ranks and servers die around it.
_HONEST_FAILURES: Final = frozenset({"rank-lost", "rank-hung", "not-ready", "draining", "queue-full", "queue-timeout"})
#: What a poisoned request does to itself; its ranks may die of some of these.
_POISON_ENDS: Final = frozenset(
    {"validation-error", "worker-error", "encoding-error", "rank-lost", "rank-hung", "cancelled"}
)


@dataclass(frozen=True)
class Request:
    """One request as its client meant it.

    Attributes:
        number: which one, from 0.
        secret: its own.
        stream: asked as an event stream.
        steps: how many updates a whole stream has.
        ends: suffixes of problems that are right answers; the honest failures are allowed in addition.
        must_fail: a good result would be wrong.
        leaves: its client goes away in the middle, so it sees no end.
        limit: seconds within which it must be over, whatever happens.
    """

    number: int
    secret: str
    stream: bool
    steps: int
    ends: frozenset[str] = frozenset()
    must_fail: bool = False
    leaves: bool = False
    limit: float = 60.0


@dataclass
class Seen:
    """What a client saw.

    Attributes:
        status: of the HTTP answer; None without one.
        text: the body, as much as came.
        broken: the connection broke (or could not be made) before the end.
        seconds: from the request to the end.
        server_died: the server process was replaced meanwhile.
    """

    status: int | None = None
    text: str = ""
    broken: bool = False
    seconds: float = 0.0
    server_died: bool = False


@dataclass
class Ledger:
    """All verdicts: how requests ended, and what was wrong."""

    ends: dict[str, int] = field(default_factory=dict)
    wrongs: list[str] = field(default_factory=list)

    def judge(self, request: Request, seen: Seen) -> str:
        """Judge one request; return how it ended in one word."""
        end, wrongs = verdict(request, seen)
        self.ends[end] = self.ends.get(end, 0) + 1
        self.wrongs += [f"request {request.number}: {wrong}" for wrong in wrongs]
        return end


def verdict(request: Request, seen: Seen) -> tuple[str, list[str]]:
    """Return how the request ended, and what about that is wrong."""
    wrongs = []
    foreign = {found for found in SECRET.findall(seen.text) if found != request.secret}
    if foreign:
        wrongs.append(f"saw foreign secrets {sorted(foreign)[:3]}")
    if seen.seconds > request.limit:
        wrongs.append(f"took {seen.seconds:.1f} s of {request.limit:g} s")
    if request.leaves:
        return "left", wrongs
    if seen.broken or seen.status is None:
        if not seen.server_died:
            wrongs.append(f"its connection broke while its server lived (status {seen.status}, {seen.text[-200:]!r})")
        return "broken", wrongs
    if request.stream and seen.status == 200:
        return _stream(request, seen.text, wrongs)
    return _answer(request, seen, wrongs)


def _answer(request: Request, seen: Seen, wrongs: list[str]) -> tuple[str, list[str]]:
    try:
        body = json.loads(seen.text)
    except ValueError:
        return "no json", [*wrongs, f"{seen.status} without JSON: {seen.text[:200]!r}"]
    if seen.status == 200:
        return _result(request, body, wrongs)
    return _problem(request, body, wrongs)


def _result(request: Request, body: dict[str, Any], wrongs: list[str]) -> tuple[str, list[str]]:
    if request.must_fail:
        wrongs.append("succeeded though it cannot")
    elif body.get("secret") != request.secret:
        wrongs.append(f"the result is not its own: {str(body)[:200]}")
    elif "poison" not in body and body.get("steps") != request.steps:
        wrongs.append(f"{body.get('steps')} steps instead of {request.steps}")
    return "ok", wrongs


def _problem(request: Request, body: dict[str, Any], wrongs: list[str]) -> tuple[str, list[str]]:
    suffix = str(body.get("type", "")).rpartition("/")[2]
    if suffix not in request.ends | _HONEST_FAILURES:
        wrongs.append(f"an end that nobody asked for: {suffix or body}: {str(body.get('detail'))[:300]}")
    return suffix, wrongs


def _stream(request: Request, text: str, wrongs: list[str]) -> tuple[str, list[str]]:
    events = list(events_of(text))
    terminal = [event for event in events if event[0] in ("result", "error")]
    if len(terminal) != 1 or not events or events[-1] is not terminal[0]:
        return "no end", [*wrongs, f"{len(terminal)} terminal events, the last event is {events[-1:] or None}"]
    if [id for _, id, _ in events] != list(range(len(events))):
        wrongs.append(f"event ids {[id for _, id, _ in events][:20]}")
    steps = [data.get("step") for kind, _, data in events if kind == "update"]
    if steps != list(range(len(steps))):
        wrongs.append(f"updates out of order or lost: {steps[:30]}")
    kind, _, data = terminal[0]
    if kind == "error":
        return _problem(request, data, wrongs)
    if "poison" not in data and len(steps) != request.steps:
        wrongs.append(f"{len(steps)} of {request.steps} updates in a stream that ended well")
    return _result(request, data, wrongs)


def events_of(text: str) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Yield (kind, id, data) of every server-sent event in ``text``; pings are left out."""
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            yield fields.get("event", ""), int(fields.get("id", -1)), json.loads(fields.get("data", "{}"))


def poison_ends() -> frozenset[str]:
    """Problems that a poisoned request may end with."""
    return _POISON_ENDS
