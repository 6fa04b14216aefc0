"""The checker of ``make chaos`` can fail: each invariant trips on a wrong history, and none on a right one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from chaos.faults import FAULTS
from chaos.model import Ledger, Request, Seen, failure_wrongs, foreign_in_log, growth, verdict
from chaos.schedule import FATAL, STEADY, quick, schedule

OWN, FOREIGN = "secret-00000000000000aa", "secret-00000000000000bb"
ASKED = Request(number=7, secret=OWN, stream=False, steps=3)
STREAMED = replace(ASKED, stream=True)
DOOMED = replace(ASKED, ends=frozenset({"request-timeout"}), must_fail=True, at_least=0.5)


def answer(status: int = 200, **body: Any) -> Seen:
    return Seen(status=status, text=json.dumps(body or {"secret": OWN, "steps": 3}), seconds=1.0)


def problem(suffix: str, status: int = 503, hit: frozenset[int] = frozenset(), **body: Any) -> Seen:
    whole = {"type": f"https://x/{suffix}", "status": status, "request_id": "chaos-7", "detail": "why", **body}
    return Seen(status=status, text=json.dumps(whole), seconds=1.0, hit=hit)


def event(kind: str, id: int, **data: Any) -> str:
    return f"event: {kind}\nid: {id}\ndata: {json.dumps(data)}\n\n"


def updates(*steps: int, secret: str = OWN) -> str:
    return "".join(event("update", n, secret=secret, step=step) for n, step in enumerate(steps))


RESULT = event("result", 3, secret=OWN, steps=3)


def stream(text: str, **seen: Any) -> Seen:
    return Seen(status=200, text=text, **{"seconds": 1.0, **seen})


RIGHT: dict[str, tuple[Request, Seen, str]] = {
    "an answer": (ASKED, answer(), "ok"),
    "a stream with a ping": (STREAMED, stream(": ping\n\n" + updates(0, 1, 2) + RESULT), "ok"),
    "a time-out": (DOOMED, problem("request-timeout", 504), "request-timeout"),
    "a lost rank that was hit": (ASKED, problem("rank-lost", hit=frozenset({1}), rank=1), "rank-lost"),
    "an error event": (
        STREAMED,
        stream(
            updates(0) + event("error", 1, type="https://x/rank-lost", status=503, request_id="chaos-7", rank=0),
            hit=frozenset({0}),
        ),
        "rank-lost",
    ),
    "cancelled by somebody": (ASKED, replace(problem("cancelled", 499), cancelled=True), "cancelled"),
    "the server died": (STREAMED, stream(updates(0, 1)[:-4], broken=True, server_died=True), "broken"),
    "the client left": (STREAMED, stream(updates(0, 1)[:-4], left=True), "left"),
}
WRONG: dict[str, tuple[Request, Seen, str]] = {
    "a foreign secret in the answer": (ASKED, answer(secret=OWN, steps=3, other=FOREIGN), "foreign"),
    "a foreign secret in an update": (STREAMED, stream(updates(0, 1, 2, secret=FOREIGN) + RESULT), "foreign"),
    "a foreign secret in the details of an error": (ASKED, problem("not-ready", detail=f"after {FOREIGN}"), "foreign"),
    "a foreign secret before the client left": (
        STREAMED, stream(updates(0, secret=FOREIGN), left=True), "foreign"),
    "the result of another": (ASKED, answer(secret="", steps=3), "not its own"),
    "too few steps": (ASKED, answer(secret=OWN, steps=2), "2 steps instead of 3"),
    "no terminal event": (STREAMED, stream(updates(0, 1, 2)), "0 terminal events"),
    "two terminal events": (STREAMED, stream(updates(0, 1, 2) + RESULT + RESULT), "2 terminal events"),
    "something after the end": (
        STREAMED, stream(updates(0, 1) + RESULT + event("update", 4, secret=OWN, step=2)), "terminal events"),
    "something after the end of a stream that was left": (
        STREAMED, stream(event("result", 0, secret=OWN, steps=3) + event("update", 1, step=0), left=True), "after the"),
    "a stream that is cut off": (STREAMED, stream((updates(0, 1, 2) + RESULT)[:-5]), "cut off"),
    "a lost update": (STREAMED, stream(updates(0, 2) + event("result", 2, secret=OWN, steps=3)), "out of order or lost"),
    "a lost last update": (STREAMED, stream(updates(0, 1) + event("result", 2, secret=OWN, steps=3)), "2 of 3 updates"),
    "updates that changed places": (STREAMED, stream(updates(1, 0, 2) + RESULT), "out of order"),
    "ids with a hole": (STREAMED, stream(updates(0, 1, 2) + event("result", 5, secret=OWN, steps=3)), "event ids"),
    "a lost update before the server died": (
        STREAMED, stream(updates(0, 2), broken=True, server_died=True), "out of order or lost"),
    "too late": (ASKED, replace(answer(), seconds=61), "took 61.0 s of 60 s"),
    "a broken connection to a server that lives": (ASKED, Seen(broken=True), "while its server lived"),
    "a good end of what cannot end well": (DOOMED, answer(), "succeeded though it cannot"),
    "a time-out that comes too early": (DOOMED, replace(problem("request-timeout", 504), seconds=0.2), "after 0.200 s"),
    "an end that nobody asked for": (ASKED, problem("worker-error", 500), "nobody asked for: worker-error"),
    "cancelled by nobody": (ASKED, problem("cancelled", 499), "nobody asked for: cancelled"),
    "the wrong rank is blamed": (ASKED, problem("rank-lost", hit=frozenset({1}), rank=0), "blames rank 0, hit were [1]"),
    "a rank is blamed and none was hit": (ASKED, problem("rank-hung", rank=0), "blames rank 0"),
    "the problem of another": (ASKED, problem("not-ready", request_id="chaos-8"), "request chaos-8"),
    "a status that is not the body's": (ASKED, replace(problem("not-ready"), status=500), "a body that says 503"),
    "no JSON": (ASKED, Seen(status=500, text="Internal Server Error"), "without JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_history_is_right(case: str) -> None:
    request, seen, end = RIGHT[case]
    assert verdict(request, seen) == (end, [])


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_history_is_wrong(case: str) -> None:
    request, seen, words = WRONG[case]
    _, wrongs = verdict(request, seen)
    assert any(words in wrong for wrong in wrongs), wrongs


def test_the_ledger_counts_ends_and_keeps_what_was_wrong() -> None:
    ledger = Ledger()
    assert [ledger.judge(ASKED, answer()), ledger.judge(ASKED, answer(secret="", steps=3))] == ["ok", "ok"]
    assert ledger.ends == {"ok": 2}
    assert [wrong.partition(":")[0] for wrong in ledger.wrongs] == ["request 7"]


# -- the log


def line(message: str, **fields: Any) -> bytes:
    return json.dumps({"message": message, **fields}).encode()


def test_a_secret_may_only_be_in_a_line_of_its_request() -> None:
    known = {OWN: "chaos-7", FOREIGN: "chaos-8"}
    assert foreign_in_log(line(f"{OWN} begins", request_id="chaos-7"), known) == []
    assert foreign_in_log(line("2 ranks ready"), known) == []
    assert foreign_in_log(line(f"{OWN} begins", request_id="chaos-8"), known)
    assert foreign_in_log(line(f"{OWN} begins"), known), "a line of no request"
    assert foreign_in_log(line(f"{OWN} and {FOREIGN}", request_id="chaos-7"), known)
    assert foreign_in_log(f"Traceback: {OWN}".encode(), known), "no JSON"


def test_the_ledger_judges_the_log_and_counts_what_it_saw() -> None:
    ledger = Ledger(secrets={OWN: "chaos-7"})
    ledger.judge_log([line("2 ranks ready"), line(OWN, request_id="chaos-7"), line(OWN, request_id="chaos-8")])
    assert (ledger.logged, len(ledger.wrongs)) == (2, 1)


# -- lastFailure

KILLED: set[tuple[str, int | None]] = {("Killed", 9), ("Stuck", None)}
BEFORE = {"restarts": 3, "lastFailure": None}


def after(**failure: Any) -> dict[str, Any]:
    return {"restarts": 4, "lastFailure": {"reason": "Killed", "signal": 9, "rank": 1, **failure}}


def test_last_failure_names_the_rank_that_was_hit() -> None:
    assert failure_wrongs(BEFORE, after(), KILLED, frozenset(), 1) == []
    assert failure_wrongs(BEFORE, after(reason="Stuck", signal=None), KILLED, frozenset(), 1) == []
    assert failure_wrongs(BEFORE, after(), KILLED, frozenset(), 0), "another rank"
    assert failure_wrongs(BEFORE, after(), KILLED, frozenset({1}), 0), "a poison does not kill by a signal of ours"
    assert failure_wrongs(BEFORE, after(reason="RankHung", signal=None), KILLED, frozenset(), 1), "another reason"
    assert failure_wrongs(BEFORE, BEFORE, KILLED, frozenset(), 1), "no restart"
    assert failure_wrongs(BEFORE, {"restarts": 4, "lastFailure": None}, KILLED, frozenset(), 1), "no failure told"
    assert failure_wrongs(BEFORE, after(reason="Exited", signal=None, rank=0), KILLED, frozenset({0}), 1) == []


# -- the audit


def test_growth_is_the_slope() -> None:
    assert growth([(0, 5.0), (10, 7.0), (20, 9.0)]) == pytest.approx(0.2)
    assert growth([(0, 5.0), (10, 9.0), (20, 5.0)]) == pytest.approx(0.0)
    assert growth([(0, 5.0), (10, 7.0)]) == 0.0, "too few to say"


# -- the schedule


def test_a_seed_gives_the_same_schedule() -> None:
    assert schedule(7, 300, 2) == schedule(7, 300, 2)
    assert schedule(7, 300, 2)[:100] == schedule(7, 100, 2)
    assert schedule(7, 100, 2) != schedule(8, 100, 2)
    assert quick(7, 2) == quick(7, 2)


def test_a_schedule_has_every_kind_and_knows_each() -> None:
    assert set(STEADY) | set(FATAL) == set(FAULTS)
    faults = schedule(1, 1000, 2)
    assert {fault.kind for fault in faults} == set(FAULTS)
    assert {fault.rank for fault in faults} == {0, 1}
    assert {fault.kind for fault in quick(1, 2)} == set(FAULTS) - {"freeze-nursery"}
    assert "fill-disk" not in {fault.kind for fault in schedule(1, 1000, 2, without={"fill-disk"})}
