"""What a call's body may be: media types, schema problems in FastAPI's shape, reserved names."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from drumline.errors import InvalidPayload
from drumline.problems import ProblemError
from drumline.server.body import PayloadCheck, check_media_type, read
from drumline.server.body_budget import BodyBudget
from drumline.server.exchange import CONNECTION_KEY, ClientGoneError, Exchange, Message
from drumline.signature import request_model


def exchange(**headers: str) -> Exchange:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Exchange({"type": "http", "method": "POST", "path": "/", "headers": raw}, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "application/json"},
        {"content_type": "application/json; charset=utf-8"},
        {"content_type": 'Application/JSON;charset="UTF-8"'},
        {"content_type": "application/vnd.api+json"},
        {},
        {"content_length": "0"},
        {"content_type": "application/x-www-form-urlencoded", "user_agent": "curl/8.5"},
    ],
)
def test_media_types_taken(headers: dict[str, str]) -> None:
    check_media_type(exchange(**headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "multipart/form-data; boundary=x"},
        {"content_type": "application/json; charset=latin-1"},
        {"content_type": "text/json+json"},
        {"content_length": "3"},
        {"transfer_encoding": "chunked"},
        {"content_type": "application/json", "content_encoding": "gzip"},
        {"content_type": "application/x-www-form-urlencoded", "origin": "https://evil.example"},
        {"content_type": "application/x-www-form-urlencoded", "sec_fetch_site": "cross-site"},
    ],
)
def test_media_types_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ProblemError) as caught:
        check_media_type(exchange(**headers))
    assert caught.value.problem.status == 415


class Connection:
    """One whose request is all there."""

    body_complete = True


async def test_a_client_that_left_before_its_body_was_read_asked_for_nothing() -> None:
    """Its body is gone with it; an empty one would be a request of nobody."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], CONNECTION_KEY: Connection()}
    with pytest.raises(ClientGoneError):
        await read(Exchange(scope, receive, None), 100, BodyBudget(1000, 100))  # type: ignore[arg-type]


class Part(BaseModel):
    weight: float


class Worker:
    def __call__(
        self,
        prompt: str,
        n: Annotated[int, Field(ge=1, le=4)] = 1,
        mode: Literal["fast", "good"] = "fast",
        seed: int | None = None,
        name: Annotated[str, Field(min_length=2, max_length=5, pattern="^[a-z]+$")] = "abc",
        parts: list[Part] = [],  # noqa: B006
        streaming: bool = False,
    ) -> dict[str, Any]: ...


SCHEMA = request_model(Worker).json_schema()


def problems_of(payload: dict[str, Any], schema: dict[str, Any] | None = SCHEMA) -> dict[str, tuple[str, str]]:
    with pytest.raises(InvalidPayload) as caught:
        PayloadCheck()(payload, schema)
    return {".".join(map(str, item["loc"])): (item["type"], item["msg"]) for item in caught.value.detail}


def test_payloads_that_fit() -> None:
    check = PayloadCheck()
    check({"prompt": "a"}, SCHEMA)
    check({"prompt": "a", "n": 4, "mode": "good", "seed": None, "name": "abc", "parts": [{"weight": 1}]}, SCHEMA)
    check({"anything": object}, None)


def test_all_problems_are_told_with_place_and_expectation() -> None:
    found = problems_of(
        {"n": 9, "mode": "slow", "seed": "x", "name": "A", "parts": [{"weight": "w"}, {}], "promt": "a cat"}
    )
    assert found["body.prompt"] == ("missing", "Field required")
    assert found["body.n"] == ("less_than_equal", "Input should be less than or equal to 4")
    assert found["body.mode"] == ("enum", "Input should be one of 'fast', 'good'")
    assert found["body.seed"] == ("union", "Input should be an integer or null")
    assert found["body.parts.0.weight"] == ("type_error", "Input should be a number")
    assert found["body.parts.1.weight"] == ("missing", "Field required")
    assert found["body.promt"][0] == "extra_forbidden"
    assert "did you mean 'prompt'" in found["body.promt"][1]
    assert found["body.name"][0] in ("string_too_short", "string_pattern_mismatch")


def test_problems_never_repeat_values() -> None:
    secret = "my private prompt " * 1000
    with pytest.raises(InvalidPayload) as caught:
        PayloadCheck()({"prompt": "a", "n": secret, "mode": secret, "seed": secret, "name": secret}, SCHEMA)
    assert "private" not in str(caught.value)
    assert "private" not in str(caught.value.detail)
    assert len(caught.value.detail) >= 4


def test_reserved_names() -> None:
    assert set(problems_of({"self": 1, "streaming": True}, None)) == {"body.self", "body.streaming"}
    PayloadCheck()({"func": 1, "timeout": 2, "rank": 3, "payload": 4}, None)


def test_many_problems_are_cut() -> None:
    with pytest.raises(InvalidPayload) as caught:
        PayloadCheck()({"prompt": "a", **{f"k{i}": 1 for i in range(1000)}}, SCHEMA)
    assert len(caught.value.detail) == 100


def test_schema_that_cannot_be_compiled_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    check = PayloadCheck()
    for schema in ({"type": "nonsense"}, {"$ref": "https://example.org/nowhere.json"}):
        check({"a": 1}, schema)
        check({"a": 2}, schema)
    assert len([record for record in caplog.records if "request schema" in record.message]) == 2


def test_schema_may_change() -> None:
    check = PayloadCheck()
    check({"a": 1}, None)
    with pytest.raises(InvalidPayload):
        check({"a": 1}, SCHEMA)
    check({"a": 1}, {"type": "object"})
