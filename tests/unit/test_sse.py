import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline import sse


def test_exact_bytes() -> None:
    assert sse.update(0, b'{"a":1}') == b'event: update\nid: 0\ndata: {"a":1}\n\n'
    assert sse.result(7, b"{}") == b"event: result\nid: 7\ndata: {}\n\n"
    assert sse.error(12, b'{"error":"x"}') == b'event: error\nid: 12\ndata: {"error":"x"}\n\n'
    assert sse.PING == b": ping\n\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=8,
)


@pytest.mark.parametrize("make", [sse.update, sse.result, sse.error])
@given(value=JSON, indent=st.sampled_from([None, 2]))
@settings(max_examples=50)
def test_data_is_one_line_of_the_same_json(make, value, indent) -> None:
    lines = make(3, json.dumps(value, indent=indent).encode()).split(b"\n")
    assert lines[3:] == [b"", b""]
    assert json.loads(lines[2].removeprefix(b"data: ")) == value


def test_line_breaks_between_tokens_become_spaces() -> None:
    assert sse.update(0, b'{\r\n"a":\r1}\n') == b'event: update\nid: 0\ndata: {  "a": 1} \n\n'


def test_headers() -> None:
    headers = dict(sse.HEADERS)
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"
