"""Problems come back as the errors that they were made from."""

import json

import pytest

from drumline import problems
from drumline.client_errors import BUILDERS, from_problem, from_response
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

ERRORS = [
    SetupFailed("no weights", rank=1, exception_type="OSError", remote_traceback="Traceback ..."),
    WorkerError("bad prompt", rank=2, exception_type="app.Bad", remote_traceback="Traceback ..."),
    NotReady("starting", state="starting", retry_after=3.0),
    Draining("leaving", state="draining", retry_after=2.0),
    QueueFull("64 wait", retry_after=7.0),
    InvalidPayload("steps: too many", detail=[{"loc": ["body", "steps"], "msg": "too many", "type": "x"}]),
    EncodingError("result.x: a lock"),
    InvalidJson("not JSON: byte 3"),
    RequestTimeout("too long"),
    QueueTimeout("waited too long"),
    RequestCancelled("stopped", step=4),
    RankLost(1, signal=9),
    RankLost(0, exit_code=3, reason="OutOfMemory"),
    RankHung(1, step=7, stacks={0: "a", 1: "b"}),
    DrumlineError("unknown"),
]


def across_http(error):
    problem = problems.from_error(error, "r-1", debug=True)
    headers = {name.lower(): value for name, value in problem.headers()}
    return from_response(problem.status, headers, problem.body(), "http://app/")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way(error):
    back = across_http(error)
    assert type(back) is type(error)
    assert back.request_id == "r-1"
    ours, theirs = dict(vars(error)), dict(vars(back))
    theirs.pop("request_id")
    ours.pop("depth", None)  # how many wait is in the text only
    theirs.pop("depth", None)
    assert theirs == ours
    if type(error) is not DrumlineError:
        assert str(back) == str(error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_through_a_stream(error):
    back = from_problem(json.loads(problems.from_error(error, "r-1").body()))
    assert type(back) is type(error)


def test_every_problem_has_a_way_back():
    assert set(BUILDERS) == set(problems.CATALOGUE)


@pytest.mark.parametrize("suffix", problems.CATALOGUE)
def test_the_bare_problem_is_an_error_with_its_text(suffix):
    problem = problems.make(suffix, "what happened", "r-2")
    error = from_response(problem.status, {}, problem.body(), "http://app/")
    assert "what happened" in str(error)
    assert error.request_id == "r-2"


@pytest.mark.parametrize(
    "member", ["rank", "step", "signal", "exit_code", "stacks", "state", "detail", "exception_type"]
)
@pytest.mark.parametrize("suffix", problems.CATALOGUE)
def test_members_of_odd_types_are_no_crash(suffix, member):
    body = {"type": problems.TYPE_PREFIX + suffix, "error": "text", member: ["odd"]}
    assert "text" in str(from_problem(body))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidPayload),
        (401, ConfigurationError),
        (404, ConfigurationError),
        (429, QueueFull),
        (502, NotReady),
        (503, NotReady),
        (504, RequestTimeout),
        (500, DrumlineError),
        (418, DrumlineError),
    ],
)
def test_other_servers_answers_are_told_with_their_text(status, kind):
    error = from_response(status, {"x-request-id": "r-3"}, b"<html>\n no  luck</html>", "http://app/")
    assert type(error) is kind
    assert str(error) == f"http://app/ answered {status}: <html> no luck</html>"
    assert error.request_id == "r-3"


def test_a_fastapi_answer_keeps_its_details():
    detail = [{"loc": ["body", "x"], "msg": "Field required", "type": "missing"}]
    error = from_response(422, {}, json.dumps({"detail": detail}).encode(), "http://app/")
    assert isinstance(error, InvalidPayload)
    assert error.detail == detail


@pytest.mark.parametrize(
    ("text", "seconds"), [("3", 3.0), ("", None), ("Fri, 31 Dec 1999", None), ("-1", None), ("inf", None)]
)
def test_retry_after(text, seconds):
    error = from_response(503, {"retry-after": text}, b"", "http://app/")
    assert isinstance(error, NotReady)
    assert error.retry_after == seconds
