"""Any value survives the wire, any bytes are survived by the wire, and JSON is always JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from drumline.codec import EncodedImage, from_json, pack, snapshot, to_json, unpack
from drumline.errors import EncodingError, InvalidJson

TORCH_DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.bool,
    torch.int64,
    torch.complex64,
    torch.uint16,
]
NUMPY_DTYPES = ["<f4", ">f8", "|b1", "<i2", "<u8", "<c8", "<M8[ns]", "<U3", "|S2"]

texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = texts | st.integers(-(2**63), 2**64 - 1)
shapes = st.lists(st.integers(0, 4), max_size=3)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | texts
    | st.binary()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(shapes)
    tensor = torch.arange(math.prod(shape)).remainder(2).to(draw(st.sampled_from(TORCH_DTYPES))).view(shape)
    return tensor.transpose(0, 1) if len(shape) > 1 and draw(st.booleans()) else tensor


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    shape = draw(shapes)
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    array = np.frombuffer(bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape) if 0 not in shape else None
    array = np.zeros(shape, dtype) if array is None else array
    return array.T if draw(st.booleans()) else array


@st.composite
def pictures(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "HSV", "LAB", "YCbCr"]))
    return Image.new(mode, (draw(st.integers(1, 9)), draw(st.integers(1, 9))))


encoded = st.builds(EncodedImage, texts, st.integers(0, 99), st.integers(0, 99), st.binary())
rich = scalars | tensors() | arrays() | pictures() | encoded


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.to(torch.complex128).equal(right.to(torch.complex128))
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, float):
        assert left == right or (math.isnan(left) and math.isnan(right))
    else:
        assert left == right


def survive(data: bytes | bytearray, buffers: list[Any]) -> None:
    """Damaged data is a value or an EncodingError, and its JSON is JSON."""
    with contextlib.suppress(EncodingError):
        unpack(data, buffers)
    with contextlib.suppress(EncodingError):
        json.loads(to_json(data, buffers), parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(nested(rich), st.sampled_from([0, 10, 65536]))
def test_round_trip(value: Any, inline_limit: int) -> None:
    assert_same(unpack(*pack(value, inline_limit=inline_limit)), value)
    assert_same(unpack(*pack(snapshot(value), inline_limit=inline_limit)), value)


@given(nested(scalars))
def test_json_is_json_or_an_encoding_error(value: Any) -> None:
    try:
        text = to_json(*pack(value))
    except EncodingError as error:
        assert "cannot be carried by JSON" in str(error)
        assert any(name in str(error) for name in ("NaN", "Infinity"))
        return
    json.loads(text, parse_constant=refuse_constant)
    assert len(text.decode().splitlines()) == 1


@given(nested(rich), st.sampled_from(["jpeg", "png", "webp", "pixels"]))
def test_json_of_rich_values(value: Any, images: str) -> None:
    try:
        text = to_json(*pack(value, images=images))
    except EncodingError as error:
        assert str(error).startswith("result")
        return
    json.loads(text, parse_constant=refuse_constant)
    assert len(text.decode().splitlines()) == 1


@given(nested(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts))
def test_json_payloads_survive_the_whole_way(value: Any) -> None:
    body = json.dumps({"v": value}).encode()
    payload = from_json(body)
    assert payload == json.loads(body)
    assert json.loads(to_json(*pack(payload, path="payload"))) == payload


@settings(max_examples=300)
@given(st.binary())
@example(b"\xdf\xff\xff\xff\xff")
def test_hostile_documents(data: bytes) -> None:
    survive(data, [])


@settings(max_examples=300)
@given(nested(rich), st.data())
def test_damaged_documents(value: Any, data: st.DataObject) -> None:
    document, buffers = pack(value, inline_limit=data.draw(st.sampled_from([0, 65536])))
    damaged = bytearray(document)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    parts = [bytes(buffer) for buffer in buffers]
    if parts:
        index = data.draw(st.integers(0, len(parts) - 1))
        parts[index] = parts[index][: data.draw(st.integers(0, len(parts[index])))]
    survive(damaged, parts)


@settings(max_examples=300)
@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_hostile_bodies(body: bytes) -> None:
    try:
        value = from_json(body)
    except InvalidJson as error:
        assert error.detail[0]["type"] == "json_invalid"
        str(error).encode()
    else:
        assert value == json.loads(body, parse_constant=refuse_constant)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"":'])
@given(st.integers(1, 5_000))
@settings(max_examples=20)
def test_any_depth_of_a_body(opening: bytes, depth: int) -> None:
    closing = opening[::-1].translate(bytes.maketrans(b"[{", b"]}")).replace(b':"a"', b"").replace(b':""', b"")
    body = b'{"v":' + opening * depth + b"1" + closing * depth + b"}"
    levels = 1 + depth * (2 if len(closing) == 2 else 1)
    if levels > 200:
        with pytest.raises(InvalidJson, match="nested deeper than 200 levels"):
            from_json(body)
    else:
        to_json(*pack(from_json(body)))
