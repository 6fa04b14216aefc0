"""What may come back: the model beside the real system. PURE: a request, what its client saw, and the verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

#: Every secret looks like this, so that a foreign one is found wherever it lies.
SECRET: Final = re.compile(r"secret-[0-9a-f]{16}")
SECRET_PREFIX: Final = b"secret-"
#: Request ids are made of it, so that a log line's request is known.
ID_PREFIX: Final = "chaos-"

#: How a request may end that was neither cancelled nor wrong, while ranks and servers die around it.
_HONEST_FAILURES: Final = frozenset({"rank-lost", "rank-hung", "not-ready", "draining", "queue-full"})
#: What a poisoned request does to itself; its ranks may die of some of these.
_POISON_ENDS: Final = frozenset({"validation-error", "worker-error", "encoding-error", "cancelled"})


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
        at_least: seconds before which it cannot end in one of ``ends``.
        limit: seconds within which it must be over, whatever happens.
    """

    number: int
    secret: str
    stream: bool
    steps: int
    ends: frozenset[str] = frozenset()
    must_fail: bool = False
    leaves: bool = False
    at_least: float = 0.0
    limit: float = 60.0


@dataclass
class Seen:
    """What a client saw, and what had happened around it.

    Attributes:
        status: of the HTTP answer; None without one.
        text: the body, as much as came.
        broken: the connection broke (or could not be made) before the end.
        left: the client closed the connection.
        seconds: from the request to the end.
        server_died: the server process was replaced meanwhile.
        cancelled: somebody else cancelled it, or may have.
        hit: ranks that a fault or a poison hit meanwhile, or shortly before; -1: the parent of all.
    """

    status: int | None = None
    text: str = ""
    broken: bool = False
    left: bool = False
    seconds: float = 0.0
    server_died: bool = False
    cancelled: bool = False
    hit: frozenset[int] = frozenset()


@dataclass
class Ledger:
    """All verdicts.

    Attributes:
        ends: how requests ended.
        wrongs: what was wrong.
        secrets: request id by secret.
        logged: lines of the log that had a secret.
    """

    ends: dict[str, int] = field(default_factory=dict)
    wrongs: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    logged: int = 0

    def judge(self, request: Request, seen: Seen) -> str:
        """Judge one request; return how it ended in one word."""
        end, wrongs = verdict(request, seen)
        self.ends[end] = self.ends.get(end, 0) + 1
        self.wrongs += [f"request {request.number}: {wrong}" for wrong in wrongs]
        return end

    def judge_log(self, lines: Iterable[bytes]) -> None:
        """Judge lines of the server's log: a secret may only be in a line of its own request."""
        for line in lines:
            if SECRET_PREFIX in line:
                self.logged += 1
                self.wrongs += foreign_in_log(line, self.secrets)


def verdict(request: Request, seen: Seen) -> tuple[str, list[str]]:
    """Return how the request ended, and what about that is wrong."""
    wrongs = []
    foreign = {found for found in SECRET.findall(seen.text) if found != request.secret}
    if foreign:
        wrongs.append(f"saw foreign secrets {sorted(foreign)[:3]}")
    if seen.seconds > request.limit:
        wrongs.append(f"took {seen.seconds:.1f} s of {request.limit:g} s")
    if seen.left or seen.broken or seen.status is None:
        if not seen.left and not seen.server_died:
            wrongs.append(f"its connection broke while its server lived (status {seen.status}, {seen.text[-200:]!r})")
        if request.stream and seen.status == 200:
            _order(list(events_of(seen.text, whole=False)), wrongs)
        return "left" if seen.left else "broken", wrongs
    if request.stream and seen.status == 200:
        return _stream(request, seen, wrongs)
    return _answer(request, seen, wrongs)


def _answer(request: Request, seen: Seen, wrongs: list[str]) -> tuple[str, list[str]]:
    try:
        body = json.loads(seen.text)
    except ValueError:
        return "no json", [*wrongs, f"{seen.status} without JSON: {seen.text[:200]!r}"]
    if seen.status == 200:
        return _result(request, body, wrongs)
    if body.get("status") != seen.status:
        wrongs.append(f"status {seen.status} with a body that says {body.get('status')}")
    return _problem(request, body, seen, wrongs)


def _result(request: Request, body: dict[str, Any], wrongs: list[str]) -> tuple[str, list[str]]:
    if request.must_fail:
        wrongs.append("succeeded though it cannot")
    elif body.get("secret") != request.secret:
        wrongs.append(f"the result is not its own: {str(body)[:200]}")
    elif "poison" not in body and body.get("steps") != request.steps:
        wrongs.append(f"{body.get('steps')} steps instead of {request.steps}")
    return "ok", wrongs


def _problem(request: Request, body: dict[str, Any], seen: Seen, wrongs: list[str]) -> tuple[str, list[str]]:
    suffix = str(body.get("type", "")).rpartition("/")[2]
    allowed = request.ends | _HONEST_FAILURES | ({"cancelled"} if seen.cancelled else set())
    if suffix not in allowed:
        wrongs.append(f"an end that nobody asked for: {suffix or body}: {str(body.get('detail'))[:300]}")
    if suffix in ("rank-lost", "rank-hung") and body.get("rank") not in seen.hit:
        wrongs.append(f"blames rank {body.get('rank')}, hit were {sorted(seen.hit)}: {str(body.get('detail'))[:300]}")
    if suffix in request.ends and seen.seconds < request.at_least:
        wrongs.append(f"{suffix} after {seen.seconds:.3f} s, not {request.at_least:g} s")
    if body.get("request_id") != f"{ID_PREFIX}{request.number}":
        wrongs.append(f"the problem is that of request {body.get('request_id')}")
    return suffix, wrongs


def _order(events: list[tuple[str, int, dict[str, Any]]], wrongs: list[str]) -> int:
    """Judge what holds for the whole and for the beginning of a stream; return how many updates it has."""
    if [id for _, id, _ in events] != list(range(len(events))):
        wrongs.append(f"event ids {[id for _, id, _ in events][:20]}")
    steps = [data.get("step") for kind, _, data in events if kind == "update"]
    if steps != list(range(len(steps))):
        wrongs.append(f"updates out of order or lost: {steps[:30]}")
    if any(kind in ("result", "error") for kind, _, _ in events[:-1]):
        wrongs.append("something after the terminal event")
    return len(steps)


def _stream(request: Request, seen: Seen, wrongs: list[str]) -> tuple[str, list[str]]:
    try:
        events = list(events_of(seen.text))
    except ValueError:
        return "no end", [*wrongs, f"cut off: {seen.text[-200:]!r}"]
    terminal = [event for event in events if event[0] in ("result", "error")]
    if len(terminal) != 1 or events[-1] is not terminal[0]:
        return "no end", [*wrongs, f"{len(terminal)} terminal events, the last event is {events[-1:] or None}"]
    steps = _order(events, wrongs)
    kind, _, data = terminal[0]
    if kind == "error":
        return _problem(request, data, seen, wrongs)
    if "poison" not in data and steps != request.steps:
        wrongs.append(f"{steps} of {request.steps} updates in a stream that ended well")
    return _result(request, data, wrongs)


def events_of(text: str, *, whole: bool = True) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Yield (kind, id, data) of every server-sent event in ``text``; pings are left out.

    Args:
        text: what came.
        whole: it has ended, so that a piece of an event is an error; else it is left out.

    Raises:
        ValueError: it ends within an event.
    """
    *blocks, rest = text.split("\n\n")
    if rest and whole:
        raise ValueError("it ends within an event")
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            yield fields.get("event", ""), int(fields.get("id", -1)), json.loads(fields.get("data", "{}"))


def poison_ends() -> frozenset[str]:
    """Problems that a poisoned request may end with."""
    return _POISON_ENDS


def failure_wrongs(
    before: dict[str, Any], after: dict[str, Any], expected: set[tuple[str, int | None]], hit: frozenset[int], rank: int
) -> list[str]:
    """Judge what ``/status`` says after a fault that took a rank.

    Args:
        before: the status when the fault was injected.
        after: the first status with another restart.
        expected: what the fault may lead to, as reasons and signals.
        hit: ranks that poisons may have taken in the same moment.
        rank: whom the fault hit.
    """
    failure = after.get("lastFailure")
    if after["restarts"] <= before["restarts"] or not failure:
        return [f"rank {rank} was hit, and no failure is told: {after}"]
    found = (failure["reason"], failure.get("signal"))
    if found in expected:
        return [] if failure.get("rank") == rank else [f"rank {rank} was hit, lastFailure says {_brief(failure)}"]
    if failure.get("rank") in hit - {rank}:
        return []  # a poison was quicker
    if rank in hit and failure.get("rank") == rank:
        return []
    return [f"rank {rank} was hit ({sorted(expected, key=str)}), lastFailure says {_brief(failure)}"]


def _brief(failure: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in failure.items() if key not in ("stacks", "traceback")}


def foreign_in_log(line: bytes, secrets: dict[str, str]) -> list[str]:
    """Return what is wrong about one line of the log: a secret in a line that belongs to another request, or to none.

    Args:
        line: JSON, as the server writes it.
        secrets: request id by secret.
    """
    text = line.decode(errors="replace")
    found = set(SECRET.findall(text))
    if not found:
        return []
    try:
        said = json.loads(text).get("request_id")
    except (ValueError, AttributeError):
        return [f"a log line with a secret is no JSON: {text[:200]}"]
    return [
        f"a log line of request {said} has the secret of {secrets.get(secret, 'nobody')}: {text[:300]}"
        for secret in sorted(found)
        if said is None or secrets.get(secret) != said
    ]


def growth(samples: list[tuple[int, float]]) -> float:
    """Return the slope of ``samples`` (x, y) by least squares; 0.0 for fewer than three."""
    if len(samples) < 3:
        return 0.0
    middle_x = sum(x for x, _ in samples) / len(samples)
    middle_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - middle_x) ** 2 for x, _ in samples)
    return sum((x - middle_x) * (y - middle_y) for x, y in samples) / spread if spread else 0.0
