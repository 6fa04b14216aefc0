"""Anything as a request: only documented answers, and the ranks serve on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks

from drumline.testing.answers import events_of, problem_of
from drumline.testing.serving import Server, running, service_for

load_all_checks()

CHECKED = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda: service_for("drumline.testing.workers:Echo", max_body_bytes=1 << 20)) as made:
        yield made


def test_only_documented_answers(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 10

    for operation in operations:

        @given(case=operation.as_strategy())
        @CHECKED
        def check(case: schemathesis.Case) -> None:
            if case.path == "/status":
                case.query = {
                    name: value for name, value in (case.query or {}).items() if name != "since"
                }  # it may wait
            answer = case.call()
            case.validate_response(answer, excluded_checks=EXCLUDED)
            assert answer.headers["x-request-id"]
            timed = {"x-request-timeout", "x-fal-request-timeout"} & {name.lower() for name in case.headers or {}}
            assert answer.status_code < 500 or (answer.status_code == 504 and timed)

        check()


def _excluded() -> list[Any]:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    # Unknown query parameters and headers are ignored, as HTTP servers do; a missing body is {}; a time-out is a 504.
    return [positive_data_acceptance, negative_data_rejection, not_a_server_error]


EXCLUDED = _excluded()

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["func", "timeout", "rank", "payload", "kwargs", "cls", "world_size", "image_format", "", "\x00", "é"]
)


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as made:
        yield made


@given(payload=st.dictionaries(NAMES | st.text(), ANY_JSON, max_size=6))
@settings(CHECKED, max_examples=60)
def test_any_object_comes_back_as_it_was(client: httpx2.Client, payload: dict[str, Any]) -> None:
    for reserved in ("self", "streaming"):
        payload.pop(reserved, None)
    body = json.dumps(payload).encode()
    answer = client.post("/", content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 400:  # the escape of half a character
        problem_of(answer, "invalid-json")
        assert b"\\ud" in body
        return
    assert answer.status_code == 200, answer.text
    assert answer.json() == payload
    stream = client.post("/stream", content=body, headers={"Content-Type": "application/json"})
    assert events_of(stream.text) == [("result", 0, payload)]


@given(body=st.binary(max_size=300) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
@settings(CHECKED, max_examples=60)
def test_any_bytes_get_an_answer(client: httpx2.Client, body: bytes) -> None:
    answer = client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422)
    assert answer.json() is not None


def test_still_serves(client: httpx2.Client) -> None:
    status = client.get("/status").json()
    assert (status["state"], status["restarts"]) == ("ready", 0)
    assert client.post("/", json={"a": 1}).json() == {"a": 1}
