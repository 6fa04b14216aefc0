"""Every error of the tree becomes the problem that the contract's table promises."""

import asyncio
import json

import pytest

from drumline import errors, problems
from drumline.errors import (
    ConfigurationError,
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

TABLE = [
    (InvalidJson("the body ends too early", position=3), 400, "invalid-json", None),
    (InvalidPayload("prompt: Field required"), 422, "validation-error", None),
    (QueueFull("64 requests wait", depth=64, retry_after=2.2), 429, "queue-full", "3"),
    (RequestCancelled("gone", step=4), 499, "cancelled", None),
    (WorkerError("bad", rank=1, exception_type="ValueError"), 500, "worker-error", None),
    (EncodingError("result.x: NaN"), 500, "encoding-error", None),
    (NotReady("starting", state="starting"), 503, "not-ready", "5"),
    (NotReady("restarting", retry_after=0.2), 503, "not-ready", "1"),
    (SetupFailed("no weights", rank=0, exception_type="OSError"), 503, "not-ready", "5"),
    (Draining("bye", retry_after=1.5), 503, "draining", "2"),
    (RankLost(1, signal=9), 503, "rank-lost", "1"),
    (RankHung(1, step=7), 503, "rank-hung", "1"),
    (RequestTimeout("too long"), 504, "request-timeout", None),
    (QueueTimeout("waited"), 504, "queue-timeout", None),
]


@pytest.mark.parametrize(
    ("error", "status", "suffix", "retry_after"), TABLE, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_table(error, status, suffix, retry_after) -> None:
    problem = problems.from_error(error, "req-1")
    body = json.loads(problem.body())
    assert (problem.status, body["status"]) == (status, status)
    assert problem.suffix == suffix == problems.outcome(error)
    assert body["type"] == f"https://drumline.dev/problems/{suffix}"
    assert body["request_id"] == "req-1"
    assert body["title"]
    assert body["error"]
    headers = dict(problem.headers())
    assert headers["content-type"] == "application/problem+json"
    assert headers.get("retry-after") == retry_after


def test_every_error_of_the_tree_is_in_the_table_or_internal() -> None:
    def below(cls):
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__() if sub.__module__ == errors.__name__))

    tree = {cls for cls in below(DrumlineError) if not cls.__name__.startswith("_")}
    mapped = {type(error) for error, *_ in TABLE}
    assert tree - mapped == {DrumlineError, ConfigurationError, errors.ConnectionFailed}


def test_members_of_known_errors() -> None:
    def body(error, **keywords):
        return json.loads(problems.from_error(error, "r", **keywords).body())

    worker = WorkerError("boom", rank=1, exception_type="app.Bad", remote_traceback="Traceback ...")
    assert body(worker)["rank"] == 1
    assert body(worker)["exception_type"] == "app.Bad"
    assert body(worker)["detail"] == "rank 1: app.Bad: boom"
    assert "traceback" not in body(worker)
    assert body(worker, debug=True)["traceback"] == "Traceback ..."
    lost = body(RankLost(0, exit_code=9))
    assert (lost["rank"], lost["exit_code"], lost["reason"]) == (0, 9, "Exited")
    assert "signal" not in lost
    assert body(RankLost(1, signal=9))["signal"] == 9
    hung = RankHung(1, step=7, stacks={1: "File ..."})
    assert (body(hung)["rank"], body(hung)["step"]) == (1, 7)
    assert "stacks" not in body(hung)
    assert body(hung, debug=True)["stacks"] == {"1": "File ..."}
    assert body(RequestCancelled(step=4))["step"] == 4
    assert "step" not in body(RequestCancelled())


def test_validation_error_has_fastapis_list_under_detail_and_the_sentence_as_title() -> None:
    detail = [{"loc": ["body", "n"], "msg": "Input should be an integer", "type": "type_error"}]
    body = json.loads(problems.from_error(InvalidPayload("n: Input should be an integer", detail=detail)).body())
    assert body["detail"] == detail
    assert body["title"] == body["error"] == "n: Input should be an integer"
    made = json.loads(problems.validation(detail * 5).body())
    assert made["title"] == "; ".join(["body.n: Input should be an integer"] * 3) + "; ..."


@pytest.mark.parametrize("error", [KeyError("secret"), ConfigurationError("/etc/secret is missing"), OSError("secret")])
def test_other_errors_say_nothing_unless_debug(error) -> None:
    body = json.loads(problems.from_error(error, "r").body())
    assert (body["status"], body["type"]) == (500, "https://drumline.dev/problems/internal-error")
    assert "secret" not in json.dumps(body)
    assert "secret" in problems.from_error(error, "r", debug=True).body().decode()


def test_outcomes() -> None:
    assert problems.outcome(None) == "ok"
    assert problems.outcome(ValueError()) == "internal-error"
    assert problems.outcome(asyncio.CancelledError()) == "cancelled"
    assert problems.outcome(problems.ProblemError(problems.make("forbidden"))) == "forbidden"


@pytest.mark.parametrize("text", ["lone \ud800 surrogate", "\x00\x1f", "\U0001f600 ok", "line\nbreak"])
def test_whatever_a_user_says_can_be_sent(text) -> None:
    raw = problems.from_error(WorkerError(text, rank=0), "r").body()
    assert b"\n" not in raw
    assert json.loads(raw)["error"].startswith("rank 0: ")


def test_details_of_any_shape_can_be_sent() -> None:
    deep = value = []
    for _ in range(100):
        value.append([])
        value = value[0]
    detail = [
        {"loc": ["body"], "msg": "\ud800", "type": "x", "ctx": {"big": 1 << 80, "error": ValueError("v"), 3: deep}}
    ]
    body = json.loads(problems.validation(detail).body())
    assert body["detail"][0]["ctx"]["big"] == str(1 << 80)


def test_catalogue_is_complete_and_has_no_two_meanings() -> None:
    for suffix, (status, title) in problems.CATALOGUE.items():
        problem = problems.make(suffix)
        assert (problem.status, problem.title) == (status, title)
        assert 400 <= status < 600
        assert problem.text
