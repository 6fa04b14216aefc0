"""What HTTP clients get (always one line of valid JSON), and what is accepted from them."""

from __future__ import annotations

import base64
import ctypes
import datetime
import decimal
import io
import json
import random
import sys
import uuid
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from drumline import attachments
from drumline.codec import EncodedImage, from_json, pack, to_json
from drumline.errors import EncodingError, InvalidJson, InvalidPayload
from drumline.json_text import MAX_JSON_DEPTH
from drumline.tensor_files import SAFETENSORS_DTYPES


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def json_of(value: Any, **options: Any) -> Any:
    text = to_json(*pack(value, **options))
    assert len(text.decode().splitlines()) == 1
    return json.loads(text, parse_constant=refuse_constant)


def file_of(part: dict[str, Any]) -> bytes:
    head, _, content = part["url"].partition(",")
    assert head == f"data:{part['content_type']};base64"
    file = base64.b64decode(content, validate=True)
    assert part["file_size"] == len(file)
    return file


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([1, -1.5, True, None, "null", "ä🎺"], [1, -1.5, True, None, "null", "ä🎺"]),
        ({1: {2**64: "big"}.popitem()[0]}, {"1": 2**64}),
        (-(2**200), -(2**200)),
        (datetime.datetime(2024, 2, 29, 1, 2, 3, 4), "2024-02-29T01:02:03.000004"),
        (datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC), "2024-02-29T00:00:00Z"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.time(1, 2, 3), "01:02:03"),
        (datetime.timedelta(days=1, seconds=2), "P1DT2S"),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("a\r\nb\u2028c\u2029d\u0085e\0\x1c\x0b\x7f", "a\r\nb\u2028c\u2029d\u0085e\0\x1c\x0b\x7f"),
        ({"\u2028\n": [b""]}, None),
        ([], []),
    ],
    ids=str,
)
def test_plain_values(value: Any, expected: Any) -> None:
    if expected is None and value is not None:
        expected = {
            "\u2028\n": [
                {
                    "url": "data:application/octet-stream;base64,",
                    "content_type": "application/octet-stream",
                    "file_size": 0,
                }
            ]
        }
    assert json_of(value) == expected


def test_event_stream_lines_hold_for_every_character() -> None:
    value = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    text = to_json(*pack(value))
    assert len(text.decode().splitlines()) == 1
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "result: NaN cannot be carried by JSON; return null or a string"),
        ({"loss": float("nan")}, "result.loss: NaN cannot be carried by JSON; return null or a string"),
        ({"a": [None, {"b c": float("inf")}]}, "result.a[1]['b c']: Infinity cannot"),
        ([[float("-inf")], "null"], "result[0][0]: -Infinity cannot"),
        ({"none": None, "t": torch.zeros(1), "x": {3: float("nan")}}, "result.x[3]: NaN cannot"),
        ({"big": 2**70, "x": (np.float32("nan"),)}, "result.x[0]: NaN cannot"),
        ({"a": [1, torch.zeros(2, dtype=torch.complex128)]}, "result.a[1]: a tensor of dtype complex128 has no"),
    ],
)
def test_what_json_cannot_carry(value: Any, message: str) -> None:
    with pytest.raises(EncodingError) as caught:
        to_json(*pack(value))
    assert str(caught.value).startswith(message)


def test_integers_that_nobody_can_print() -> None:
    assert json_of(10 ** (sys.get_int_max_str_digits() - 1)) == 10 ** (sys.get_int_max_str_digits() - 1)
    with pytest.raises(EncodingError, match=r"^result: JSON cannot carry it"):
        to_json(*pack(10**10_000))


def test_null_beside_bytes_that_look_like_nan_is_fine() -> None:
    lookalike = b"\xcb\x7f\xf8" * 10
    assert json_of({"a": None, "b": "null"}) == {"a": None, "b": "null"}
    assert file_of(json_of({"a": None, "b": lookalike})["b"]) == lookalike


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 100_000])
def test_bytes(size: int) -> None:
    content = random.Random(size).randbytes(size)
    for value in (content, bytearray(content), memoryview(content)):
        part = json_of({"a": value})["a"]
        assert list(part) == ["url", "content_type", "file_size"]
        assert part["content_type"] == "application/octet-stream"
        assert file_of(part) == content


def test_images() -> None:
    image = Image.new("RGB", (5, 3), (200, 10, 10))
    part = json_of({"image": image}, images="jpeg")["image"]
    assert list(part) == ["url", "content_type", "width", "height", "file_size"]
    assert part | {"url": "", "file_size": 0} == {
        "url": "",
        "content_type": "image/jpeg",
        "width": 5,
        "height": 3,
        "file_size": 0,
    }
    shown = Image.open(io.BytesIO(file_of(part)))
    assert shown.format == "JPEG"
    assert shown.size == (5, 3)
    forged = json_of(EncodedImage('image/"\n', 1, 1, b"x"))
    assert forged["content_type"] == 'image/"\n'


@pytest.mark.parametrize("name", SAFETENSORS_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 5)], ids=str)
def test_tensors_are_safetensors_files(name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    tensor = (torch.rand(shape) * 3).to(dtype)
    for limit in (0, 65536):
        part = json_of([tensor], inline_limit=limit)[0]
        assert list(part) == ["url", "content_type", "dtype", "shape", "file_size"]
        assert (part["dtype"], part["shape"]) == (name, list(shape))
        assert part["content_type"] == "application/safetensors"
        loaded = safetensors.torch.load(file_of(part))
        assert list(loaded) == ["data"]
        assert loaded["data"].dtype == dtype
        assert loaded["data"].shape == tensor.shape
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert loaded["data"].to(wide).equal(tensor.to(wide))


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    ">i4": np.arange(6, dtype=">i4"),
    "bool": np.array([[True], [False]]),
    "complex64": np.array(1j, np.complex64),
    "uint8": np.zeros((0, 2), np.uint8),
    "<M8[D]": np.array(["2020-01-01"], "M8[D]"),
    "<U3": np.array(["ä", "bcd"]),
    "float64": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "[('x', '<i2'), ('鼓', '<f4', (2,))]": np.zeros(2, [("x", "<i2"), ("鼓", "<f4", (2,))]),
}


@pytest.mark.parametrize("dtype", ARRAYS)
def test_arrays_are_npy_files(dtype: str) -> None:
    array = ARRAYS[dtype]
    for limit in (0, 65536):
        part = json_of([array], inline_limit=limit)[0]
        assert list(part) == ["url", "content_type", "dtype", "shape", "file_size"]
        assert (part["dtype"], part["shape"]) == (dtype, list(array.shape))
        assert part["content_type"] == "application/x-npy"
        loaded = np.load(io.BytesIO(file_of(part)), allow_pickle=False)
        assert loaded.dtype == array.dtype
        assert loaded.shape == array.shape
        assert loaded.flags.f_contiguous == array.flags.f_contiguous
        assert (loaded == array).all()


def test_an_array_with_a_very_long_dtype() -> None:
    array = np.zeros(1, [(f"field{number}", "<f4") for number in range(4000)])
    loaded = np.load(io.BytesIO(file_of(json_of(array))), allow_pickle=False, max_header_size=1_000_000)
    assert loaded.dtype == array.dtype


def test_buffers_may_be_any_memory() -> None:
    tensor = torch.arange(10.0)
    data, (content,) = pack(tensor, inline_limit=0)
    memory = (ctypes.c_uint8 * 40).from_buffer_copy(content)
    assert to_json(data, [memory]) == to_json(data, [bytes(content)]) == to_json(data, [memoryview(bytearray(content))])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xa1\xff",
        b"\x81\xc0\x01",
        b"\x81\x90\x01",
        bytes([0xD4, 99, 0]),
        bytes([0xD4, attachments.BYTES, 5]),
        bytes([0xC7, 0, attachments.TENSOR]),
        bytes([0xC7, 0, attachments.DATETIME]),
    ],
)
def test_damaged_data(data: bytes) -> None:
    with pytest.raises(EncodingError):
        to_json(data)


def test_the_path_of_messages_can_be_chosen() -> None:
    with pytest.raises(EncodingError, match=r"^update\.x: NaN"):
        to_json(*pack({"x": float("nan")}), path="update")


# --- requests


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_objects_are_read(kind: Any) -> None:
    body = b' {"a": [1, 2.5, null, true, "\\u00e4\\ud83c\\udfba"], "big": 123456789012345678901234567890, "a b": {}}\n'
    assert from_json(kind(body)) == {
        "a": [1, 2.5, None, True, "ä🎺"],
        "big": 123456789012345678901234567890,
        "a b": {},
    }
    assert from_json(kind(b'{"a":1,"a":2}')) == {"a": 2}


@pytest.mark.parametrize(
    ("body", "message", "position"),
    [
        (b"", "the body is empty; send a JSON object such as {}", 0),
        (b" \n", "the body is empty", 0),
        (b"[]", "the body must be a JSON object such as {}, not an array", None),
        (b'"x"', "not a string", None),
        (b"1", "not a number", None),
        (b"1.5", "not a number", None),
        (b"true", "not a boolean", None),
        (b"null", "not null", None),
        (b'{"a": NaN}', "NaN is not JSON; use null or a string (byte 6)", 6),
        (b'{"a": Infinity}', "Infinity is not JSON; use null or a string (byte 6)", 6),
        (b'{"a": -Infinity}', "Infinity is not JSON; use null or a string (byte 7)", 7),
        (b'{"a": 1', "the body ends too early (byte 7)", 7),
        (b'{"a" 1}', "expected ':' (byte 5)", 5),
        (b"{'a': 1}", "(byte 1)", 1),
        (b'{"a": 1,}', "(byte 8)", 8),
        (b"{} {}", "trailing characters (byte 4)", 4),
        (b'{"a": 01}', "(byte 7)", 7),
        (b'{"a": "\n"}', "(byte 7)", 7),
        (b'{"a": "\xff"}', "the body is not UTF-8: invalid start byte (byte 7)", 7),
        (b"\xef\xbb\xbf{}", "(byte 0)", 0),
        (b'{"a": "\xed\xa0\x80"}', "the body is not UTF-8", 7),
        (b'{"a": 1e400}', "Number out of range", None),
        (b'{"a": 1' + b"0" * 5000 + b"}", "out of range", None),
        (b'{"a":' * (MAX_JSON_DEPTH + 1) + b"1" + b"}" * (MAX_JSON_DEPTH + 1), "nested deeper than 200 levels", None),
        (b'{"a":' + b"[" * 100_000, "nested deeper than 200 levels", None),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 200 levels", None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_bodies_say_what_and_where(body: bytes, message: str, position: int | None) -> None:
    with pytest.raises(InvalidJson) as caught:
        from_json(body)
    assert message in str(caught.value)
    assert caught.value.position == position
    assert caught.value.detail == [
        {"loc": ["body"] if position is None else ["body", position], "msg": str(caught.value), "type": "json_invalid"}
    ]
    assert isinstance(caught.value, InvalidPayload)


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"\ud800\u0041", r"\ud800x", r"\udc00\ud800"])
def test_halves_of_surrogate_pairs_are_refused(escape: str) -> None:
    with pytest.raises(InvalidJson):
        from_json(f'{{"a": "{escape} and more text"}}'.encode())


def test_depth_is_counted_exactly() -> None:
    levels = MAX_JSON_DEPTH - 1
    body = b'{"a":' + b"[" * levels + b"]" * levels + b"}"
    value = from_json(body)
    assert to_json(*pack({"echo": [value]})) == b'{"echo":[' + body + b"]}"
    wide = b'{"a":[' + b",".join([b"[1,2]"] * 1000) + b"]}"
    assert len(from_json(wide)["a"]) == 1000
    text = b'{"a":"' + b"[{" * 1000 + b'"}'
    assert from_json(text) == {"a": "[{" * 1000}


def test_forged_floats_stay_valid_json() -> None:
    for data in (b"\xca\x7f\xc0\x00\x00", b"\x81\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\x01", b"\xc4\x01\xff"):
        try:
            text = to_json(data)
        except EncodingError:
            continue
        json.loads(text, parse_constant=refuse_constant)


def test_raw_json_cannot_be_smuggled_in() -> None:
    value = {"a": '"}, {"b', "b": EncodedImage('x","evil":"y', 1, 1, b"")}
    read = json_of(value)
    assert read["a"] == value["a"]
    assert set(read["b"]) == {"url", "content_type", "width", "height", "file_size"}
    assert msgspec.json.decode(to_json(*pack(value))) == read
