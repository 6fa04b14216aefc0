"""Whatever a client sends, ``bind`` refuses it with a reason or returns arguments that the call takes."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.errors import InvalidPayload
from drumline.signature import request_model


class Closed:
    def __call__(self, prompt: str, streaming: bool = False, steps: int = 20, sizes: list[int] = (), image=None): ...


class Open:
    def __call__(self, streaming: bool = False, prompt: str = "x", steps: float = 20, **kwargs: Any): ...


class Untyped:
    def __call__(self, prompt, streaming=False, steps=20): ...


class Free:
    def __call__(self, streaming=False, **kwargs): ...


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["prompt", "steps", "sizes", "image", "self", "streaming", "func", "timeout", "kwargs"])
payloads = st.dictionaries(names | st.text(max_size=4), json_values, max_size=6)


@pytest.mark.parametrize("worker", [Closed, Open, Untyped, Free])
@given(payload=payloads)
def test_bind_refuses_with_a_reason_or_fits(worker, payload):
    before = repr(payload)
    refused: list[dict[str, Any]] | None = None
    try:
        bound = request_model(worker).bind(payload)
    except InvalidPayload as error:
        refused = error.detail
    if refused is None:
        inspect.signature(worker()).bind(streaming=True, **bound)
        assert bound.keys() == payload.keys()
    else:
        assert refused
        assert all(d["loc"][0] == "body" and d["loc"][1] in [*payload, "prompt"] for d in refused)
        json.dumps(refused, allow_nan=False)
    assert repr(payload) == before


@pytest.mark.parametrize("worker", [Untyped, Free])
@given(values=st.dictionaries(st.sampled_from(["prompt", "steps"]), json_values))
def test_untyped_values_keep_their_identity(worker, values):
    payload = {"prompt": 0, **values}
    bound = request_model(worker).bind(payload)
    assert all(bound[name] is value for name, value in payload.items())


@pytest.mark.parametrize("worker", [Closed, Open, Untyped, Free])
@given(payload=payloads)
def test_the_schema_agrees_about_names(worker, payload):
    schema = request_model(worker).json_schema()
    try:
        request_model(worker).bind(payload)
    except InvalidPayload:
        return
    assert set(schema.get("required", [])) <= payload.keys()
    assert schema["additionalProperties"] or payload.keys() <= schema["properties"].keys()
