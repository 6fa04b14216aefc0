"""Arguments that become JSON."""

import base64
import json
import sys
from io import BytesIO, TextIOWrapper

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.cli.ready import sample
from drumline.cli.values import parse
from drumline.errors import ConfigurationError


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {}),
        (["prompt=a lighthouse"], {"prompt": "a lighthouse"}),
        (["n=3", "x=0.5", "on=true", "none=null"], {"n": 3, "x": 0.5, "on": True, "none": None}),
        (['s="3"', "t=3 cats", "u=True", "v="], {"s": "3", "t": "3 cats", "u": "True", "v": ""}),
        (["list=[1, 2]", 'map={"a": 1}'], {"list": [1, 2], "map": {"a": 1}}),
        (["a=b=c", "url=https://x/?q=1"], {"a": "b=c", "url": "https://x/?q=1"}),
        (["x=NaN"], {"x": "NaN"}),
        (['{"a": 1, "b": 2}', "b=3"], {"a": 1, "b": 3}),
        (["b=3", ' {"b": 2}'], {"b": 2}),
    ],
)
def test_values(arguments, values):
    assert parse(arguments) == values


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), st.integers() | st.text() | st.booleans()))
def test_any_object_is_itself(values):
    assert parse([json.dumps(values)]) == values


@pytest.mark.parametrize("argument", ["prompt", "=x", "[1]", "{", "{'a': 1}", '{"a": NaN}', "@nowhere.json", "3"])
def test_what_is_neither_is_told(argument):
    with pytest.raises(ConfigurationError):
        parse([argument])


def test_files(tmp_path):
    (tmp_path / "all.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.txt").write_text("ä\n")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    (tmp_path / "raw").write_bytes(b"\xff\x00")
    values = parse(
        [f"@{tmp_path}/all.json", *(f"{n}=@{tmp_path}/{n}" for n in ("list.json", "text.txt", "cat.png", "raw"))]
    )
    assert values == {
        "a": 1,
        "list.json": [1],
        "text.txt": "ä\n",
        "cat.png": "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode(),
        "raw": "data:application/octet-stream;base64,/wA=",
    }
    with pytest.raises(ConfigurationError, match="a JSON object is needed"):
        parse([f"@{tmp_path}/list.json"])
    with pytest.raises(ConfigurationError, match="No such file"):
        parse([f"x=@{tmp_path}/none"])


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b'{"a": 1}')))
    assert parse(["-", "b=2"]) == {"a": 1, "b": 2}


def test_a_sample_request_fits_its_schema():
    schema = {
        "properties": {
            "prompt": {"type": "string"},
            "steps": {"type": "integer", "minimum": 4},
            "scale": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "mode": {"enum": ["fast", "good"]},
            "size": {"$ref": "#/$defs/Size"},
            "seed": {"type": "integer", "default": 7},
            "optional": {"type": "string"},
        },
        "required": ["prompt", "steps", "scale", "mode", "size", "seed"],
        "$defs": {"Size": {"type": "object", "properties": {"w": {"type": "integer"}}, "required": ["w"]}},
    }
    assert sample(schema) == {"prompt": "...", "steps": 4, "scale": 1, "mode": "fast", "size": {"w": 1}, "seed": 7}


def test_a_sample_without_required_members_shows_the_first():
    assert sample({"properties": {"beats": {"type": "integer", "default": 4}, "x": {"type": "string"}}}) == {"beats": 4}
    assert sample({}) == {}
