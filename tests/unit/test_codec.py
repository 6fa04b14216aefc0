"""Plain values, rich standard-library values, and what is refused at which place."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import subprocess
import sys
import threading
import types
import uuid
from typing import Any
from unittest.mock import MagicMock

import msgspec
import numpy as np
import pydantic
import pytest
import torch

from drumline.codec import Packed, pack, snapshot, unpack
from drumline.errors import EncodingError
from drumline.traversal import MAX_DEPTH


def carried(value: Any) -> Any:
    return unpack(*pack(value))


@dataclasses.dataclass
class Point:
    x: int
    y: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    name: str
    when: datetime.date
    site: pydantic.HttpUrl = pydantic.HttpUrl("https://example.com/a")
    inner: Point | None = None
    tensor: torch.Tensor | None = None


class Row(msgspec.Struct):
    a: int
    b: list[bytes]


class Colour(enum.Enum):
    RED = "red"
    BOTH = (1, 2)


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    A = "a"


class Text(str):
    def __str__(self) -> str:
        return "a lie"


Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**64 - 1,
        2**64,
        -(2**63) - 1,
        10**5000,
        -(2**127),
        1.5,
        float("inf"),
        "",
        "ä\u2028\r\n\0🎺",
        b"",
        b"\xff" * 10,
        b"x" * 70_000,
        [],
        {},
        {"a": [1, {"b": None}], 7: {"c": []}},
        datetime.datetime(2024, 2, 29, 12, 0, 0, 123),
        datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
        datetime.date(1, 1, 1),
        datetime.time(23, 59, 59, 999999),
        datetime.timedelta(days=-3, microseconds=1),
        decimal.Decimal("1.10"),
        decimal.Decimal("-Infinity"),
        uuid.UUID(int=7),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, int) else f"int{value.bit_length()}",
)
def test_values_that_come_back_as_they_are(value: Any) -> None:
    for wrapped in (value, [value], {"k": value, "other": torch.zeros(1)}):
        back = carried(wrapped)
        inner = back if wrapped is value else back[0] if isinstance(wrapped, list) else back["k"]
        assert inner == value
        assert type(inner) is type(value)


def test_nan_comes_back() -> None:
    assert carried([float("nan")])[0] != carried([float("nan")])[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        ({5}, [5]),
        (frozenset(), []),
        (collections.deque([1, b"x"]), [1, b"x"]),
        (range(3), [0, 1, 2]),
        ({"a": 1}.keys(), ["a"]),
        (collections.OrderedDict(a=(1,)), {"a": [1]}),
        (collections.defaultdict(list, {1: b"x"}), {1: b"x"}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.UserDict(a=1), {"a": 1}),
        (Pair(1, b"2"), [1, b"2"]),
        (Point(1, Point(2, None)), {"x": 1, "y": {"x": 2, "y": None}}),
        (Row(1, [b"z"]), {"a": 1, "b": [b"z"]}),
        (Colour.RED, "red"),
        (Colour.BOTH, [1, 2]),
        (Level.HIGH, 3),
        (Name.A, "a"),
        ({Name.A: 1, Level.HIGH: 2, np.int64(9): 3}, {"a": 1, 3: 2, 9: 3}),
        (Text("true"), "true"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcd")[::2], b"ac"),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.bytes_(b"x"), b"x"),
        (
            Model(name="n", when=datetime.date(2020, 1, 2), inner=Point(1, 2)),
            {
                "name": "n",
                "when": datetime.date(2020, 1, 2),
                "site": "https://example.com/a",
                "inner": {"x": 1, "y": 2},
                "tensor": None,
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_become_plainer(value: Any, expected: Any) -> None:
    back = carried(value)
    assert back == expected
    assert type(back) is type(expected)
    assert carried(snapshot(value)) == expected


def test_a_tensor_in_a_model_stays_a_tensor() -> None:
    back = carried(Model(name="n", when=datetime.date(2020, 1, 2), tensor=torch.ones(2)))
    assert torch.equal(back["tensor"], torch.ones(2))


class Image:
    pass


class Tensor:
    shape = (2,)
    dtype = "float32"

    def detach(self) -> Tensor:
        raise AssertionError("a class of this name was taken for torch's")


class Liar:
    """Claims to be a tensor."""

    __class__ = torch.Tensor  # type: ignore[assignment]


class BadModel(pydantic.BaseModel):
    @pydantic.model_serializer
    def fail(self) -> Any:
        raise KeyError("\ud800")


class Explosive(dict):  # type: ignore[type-arg]
    def keys(self) -> Any:
        raise RuntimeError("boom")

    def __iter__(self) -> Any:
        raise RuntimeError("boom")


def generator() -> Any:
    yield 1


async def coroutine() -> None:
    pass


REFUSED = {
    "lambda": (lambda: 1, "<lambda> of type function cannot be carried; return"),
    "class": (Image, "Image of type type cannot be carried"),
    "module": (sys, "sys of type module cannot be carried"),
    "lock": (threading.Lock(), "a value of type _thread.lock cannot be carried"),
    "generator": (generator(), "a value of type generator cannot be carried; return what it produces"),
    "map": (map(str, []), "cannot be carried; return what it produces"),
    "object": (object(), "a value of type object cannot be carried"),
    "exception": (ValueError("x"), "a value of type ValueError cannot be carried"),
    "complex": (1j, "a value of type complex cannot be carried; return [real, imaginary]"),
    "numpy complex": (np.complex64(1), "a value of type complex cannot be carried"),
    "longdouble": (np.longdouble(1), "a numpy.longdouble cannot be carried"),
    "datetime64": (np.datetime64("2020-01-01"), "a numpy.datetime64 cannot be carried"),
    "Image": (Image(), "Image cannot be carried; it is not the class of torch, PIL or numpy that has this name"),
    "Tensor": (Tensor(), "Tensor cannot be carried; it is not the class"),
    "mock": (MagicMock(spec=torch.Tensor), "a value of type unittest.mock.MagicMock cannot be carried"),
    "liar": (Liar(), "Liar cannot be carried"),
    "secret": (pydantic.SecretStr("hunter2"), "SecretStr cannot be carried"),
    "msgpack ext": (msgspec.msgpack.Ext(9, b"forged"), "Ext cannot be carried"),
    "raw": (msgspec.Raw(b"\xc1"), "Raw cannot be carried"),
    "surrogate": ("ab\ud800", "a text with a lone surrogate at character 2 cannot be carried; decode"),
    "float key": ({1.5: 1}, "a key of type float cannot be carried; make it a string"),
    "bool key": ({True: 1}, "a key of type bool cannot be carried"),
    "None key": ({None: 1}, "a key of type NoneType cannot be carried"),
    "tuple key": ({(1, 2): 1}, "a key of type tuple cannot be carried"),
    "big key": ({2**70: 1}, "a key beyond 64 bits cannot be carried"),
    "surrogate key": ({"\udfff": 1}, "a text with a lone surrogate at character 0"),
    "failing model": (BadModel(), "BadModel could not be read"),
    "failing dict": (Explosive(a=1), "Explosive could not be read (RuntimeError: boom)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_the_cure(name: str) -> None:
    value, message = REFUSED[name]
    for wrapped in ({"images": [1, 2, value]}, {"big": 2**80, "images": [torch.zeros(1), b"", value]}):
        for refuse in (pack, functools.partial(snapshot, path="result")):
            with pytest.raises(EncodingError) as caught:
                refuse(wrapped)
            text = str(caught.value)
            assert text.startswith("result.images[2]")
            assert message in text
            text.encode()  # the message itself can be carried


def test_a_coroutine_is_refused() -> None:
    running = coroutine()
    try:
        with pytest.raises(EncodingError, match="return what it produces"):
            pack(running)
    finally:
        asyncio.run(running)


def test_a_payload_is_passed_not_returned() -> None:
    with pytest.raises(EncodingError, match=r"^payload\.f: .*; pass numbers"):
        pack({"f": print}, path="payload")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a b": [object()]}, "result['a b'][0]:"),
        ({3: object()}, "result[3]:"),
        ({"k" * 100: object()}, "result['" + "k" * 40 + "...']:"),
        ({"\x1b[31m": object()}, r"result['\x1b[31m']:"),
        (object(), "result:"),
        (Point(1, [object()]), "result.y[0]:"),
        ({"ok": 1, Name.A: object()}, "result.a:"),
        ([1, {1.5: 2}], "result[1]:"),
    ],
)
def test_places(value: Any, where: str) -> None:
    with pytest.raises(EncodingError) as caught:
        pack(value)
    assert str(caught.value).startswith(where)


def nested(depth: int, leaf: Any) -> Any:
    for level in range(depth):
        leaf = [leaf] if level % 2 else {"k": leaf}
    return leaf


@pytest.mark.parametrize("leaf", [1, 2**70, b"x", Point(1, 2)], ids=["int", "big", "bytes", "dataclass"])
def test_depth_is_bounded(leaf: Any) -> None:
    deep = nested(MAX_DEPTH - 3, leaf)
    assert carried(carried(deep)) == carried(deep)
    for depth in (MAX_DEPTH + 1, 5_000):
        with pytest.raises(EncodingError, match="nested deeper than 256 levels, or it contains itself"):
            pack(nested(depth, leaf))
        with pytest.raises(EncodingError, match="nested deeper"):
            snapshot(nested(depth, leaf))


def test_cycles_are_refused() -> None:
    items: list[Any] = []
    items += [items, items]
    mapping: dict[str, Any] = {"tensor": torch.zeros(1)}
    mapping["self"] = mapping
    point = Point(1, None)
    point.y = point
    for value in (items, mapping, point, {"deep": [mapping]}):
        with pytest.raises(EncodingError, match="nested deeper than 256 levels, or it contains itself"):
            pack(value)
        with pytest.raises(EncodingError, match="contains itself"):
            snapshot(value)


def test_near_the_end_of_the_stack_it_is_still_an_encoding_error() -> None:
    value = nested(100, b"x")
    seen = set()

    def descend(left: int) -> None:
        if left:
            descend(left - 1)
        else:
            pack(value)

    for left in range(0, sys.getrecursionlimit(), 7):
        try:
            descend(left)
        except EncodingError:
            seen.add("refused")
        except RecursionError:
            seen.add("no stack for the test itself")
        else:
            seen.add("carried")
    assert seen >= {"refused", "carried"}


def test_values_that_change_meanwhile_are_copied_by_snapshot() -> None:
    value = {"list": [1], "bytes": bytearray(b"a"), "tensor": torch.zeros(2), "array": np.zeros(2), "t": (1, [2])}
    taken = snapshot(value)
    value["list"].append(2)  # type: ignore[attr-defined]
    value["bytes"][0] = 0  # type: ignore[index]
    value["tensor"] += 1  # type: ignore[operator]
    value["array"] += 1  # type: ignore[operator]
    value["t"][1].append(3)  # type: ignore[index]
    back = carried(taken)
    assert back["list"] == [1]
    assert back["bytes"] == b"a"
    assert back["tensor"].tolist() == [0, 0]
    assert back["array"].tolist() == [0, 0]
    assert back["t"] == [1, [2]]


def test_plain_snapshots_share_nothing() -> None:
    value = {"a": [1, {"b": 2}], "big": 2**90}
    for source in (value, value | {"big": 1}):
        taken = snapshot(source)
        assert taken == source
        assert taken["a"] is not source["a"]
        assert taken["a"][1] is not source["a"][1]


def test_small_parts_travel_inside_and_large_ones_beside() -> None:
    data, buffers = pack({"small": b"s" * 10, "large": b"l" * 11, "also": b"m" * 12}, inline_limit=10)
    assert [len(buffer) for buffer in buffers] == [11, 12]
    assert b"s" * 10 in data
    assert b"l" * 11 not in data
    assert unpack(data, buffers) == {"small": b"s" * 10, "large": b"l" * 11, "also": b"m" * 12}
    assert isinstance(pack({}), Packed)
    assert isinstance(pack({"b": b""}), Packed)


def test_large_bytes_are_not_copied() -> None:
    blob = b"x" * 100_000
    changeable = bytearray(blob)
    _, buffers = pack([blob, changeable])
    assert buffers[0] is blob
    assert buffers[1] is changeable
    assert unpack(*pack([blob]))[0] is blob


HOSTILE = {
    "empty": b"",
    "truncated": b"\x92\x01",
    "trailing": b"\x01\x01",
    "bad utf-8": b"\xa1\xff",
    "huge list": b"\xdd\xff\xff\xff\xff",
    "huge bytes": b"\xc6\xff\xff\xff\xff",
    "deep": b"\x91" * 100_000 + b"\xc0",
    "unhashable key": b"\x81\x81\x01\x02\x03",
    "unknown extension": b"\xd4\x63\x00",
    "reserved byte": b"\xc1",
    "bad timestamp": b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    **{f"empty extension {code}": bytes([0xC7, 0, code]) for code in range(2, 13)},
    **{f"zero extension {code}": bytes([0xD4, code, 0]) for code in range(2, 13) if code != 8},
    "bytes from a buffer that is not there": bytes([0xD4, 8, 0]),
    "buffer -1": bytes([0xD4, 8, 0xFF]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_data_is_an_encoding_error(name: str) -> None:
    with pytest.raises(EncodingError):
        unpack(HOSTILE[name])


def test_a_decoded_value_never_comes_from_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, refuse)
    value = {"t": torch.ones(3), "a": np.ones(3), "b": b"x", "n": 2**99}
    back = carried(value)
    assert torch.equal(back["t"], value["t"])
    assert (back["a"] == 1).all()


def test_the_codec_loads_no_heavy_package() -> None:
    program = """
import sys
from drumline.codec import from_json, pack, snapshot, to_json, unpack
class Image: pass
heavy = {"torch", "numpy", "PIL"}
value = {"a": [1, 2**80, b"x" * 10, float("inf")], "b": None}
assert unpack(*pack(value)) == value
snapshot(value)
to_json(*pack({"b": b"x"}))
from_json(b"{}")
try:
    pack(Image())
except Exception as error:
    assert type(error).__name__ == "EncodingError", error
else:
    raise AssertionError("a foreign class was carried")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_json_for_tensors_needs_no_torch_in_the_server() -> None:
    data, buffers = pack({"t": torch.ones(3, dtype=torch.bfloat16), "a": np.ones((2, 40_000))})
    program = f"""
import sys
from drumline.codec import to_json
text = to_json({data!r}, [bytes(640000)])
assert b"application/safetensors" in text and b"application/x-npy" in text
assert not {{"torch", "numpy", "PIL"}} & set(sys.modules)
"""
    assert [memoryview(buffer).nbytes for buffer in buffers] == [640_000]
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_missing_packages_are_named() -> None:
    data, _ = pack({"t": torch.ones(3)})
    program = f"""
import sys
sys.modules["torch"] = None
from drumline.codec import unpack
try:
    unpack({data!r})
except Exception as error:
    assert type(error).__name__ == "EncodingError", error
    assert "torch cannot be imported here" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
