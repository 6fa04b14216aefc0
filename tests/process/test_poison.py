"""Payloads, results, exceptions and deeds that nobody asked for: a value or a typed error, and the group lives on."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import pytest_asyncio
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image

from drumline import codec
from drumline.distributed import DistributedRunner
from drumline.errors import DrumlineError, EncodingError, InvalidPayload, RequestCancelled, WorkerError
from drumline.runner.ticket import Ticket
from drumline.testing.poison import DEEDS, RAISES, RESULTS, Poison
from drumline.testing.workers import Echo

pytestmark = pytest.mark.asyncio(loop_scope="module")

Groups = dict[type, DistributedRunner]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def groups() -> AsyncIterator[Groups]:
    made = {cls: DistributedRunner(cls, world_size=2, device="cpu") for cls in (Poison, Echo)}
    async with asyncio.timeout(50):
        await asyncio.gather(*(runner.start() for runner in made.values()))
    yield made
    await asyncio.gather(*(runner.stop() for runner in made.values()))


@pytest_asyncio.fixture(loop_scope="module")
async def poison(groups: Groups) -> AsyncIterator[DistributedRunner]:
    """The group; the same processes serve after the test."""
    group = groups[Poison]
    before = group.status
    yield group
    assert await group.invoke({}, timeout=20) == {"fine": True}
    after = group.status
    assert after.restarts == before.restarts
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks]


@pytest_asyncio.fixture(loop_scope="module")
async def echo(groups: Groups) -> AsyncIterator[DistributedRunner]:
    group = groups[Echo]
    pids = [rank.pid for rank in group.status.ranks]
    yield group
    assert await group.invoke({"fine": 1}, timeout=20) == {"fine": 1}
    assert [rank.pid for rank in group.status.ranks] == pids


async def ended(ticket: Ticket) -> Any:
    """The value as HTTP sees it, or the typed error."""
    try:
        packed = await asyncio.wait_for(ticket.result(), 30)
    except DrumlineError as error:
        assert str(error)
        return error
    return as_json(packed)


def as_json(packed: codec.Packed) -> Any:
    codec.unpack(packed.data, packed.buffers)
    try:
        return json.loads(codec.to_json(packed.data, packed.buffers))
    except EncodingError as error:
        return error


REFUSED = {
    "object", "lambda", "lock", "generator", "module", "class", "exception", "coroutine in a dict", "cycle", "deep",
    "hostile dict", "hostile object", "user's Image", "user's Tensor", "complex", "surrogate", "odd keys",
    "meta tensor",
}  # fmt: skip
#: What Python callers get and JSON cannot say.
NOT_JSON = {"nan", "infinity", "sparse tensor", "huge int"}
MODES = ["RGBA", "LA", "P", "CMYK", "16 bit", "32 bit", "float image", "1 bit", "LAB", "YCbCr"]
SMALL = [name for name in RESULTS if "MiB" not in name]


@pytest.mark.parametrize("how", ["return", "update", "async"])
@pytest.mark.parametrize("images", ["pixels", "jpeg"])
async def test_results_of_every_kind(poison: DistributedRunner, how: str, images: str) -> None:
    for act in SMALL:
        ticket = poison.submit({"act": act, "how": how}, streaming=how == "update", images=images)
        result = await ended(ticket)
        if how == "update" and result == {"fine": True}:
            [update] = [update async for update in ticket.updates()]
            result = as_json(update)
        if act in REFUSED:
            assert isinstance(result, EncodingError | WorkerError), act
        elif act in NOT_JSON:
            assert isinstance(result, EncodingError), act
        elif isinstance(result, DrumlineError):
            assert act in MODES, (act, result)
            assert ".image: an image of mode" in str(result)  # not every mode has a file format


@pytest.mark.parametrize("mode", MODES)
async def test_images_of_every_mode(poison: DistributedRunner, mode: str) -> None:
    pixels = await poison.invoke({"act": mode})
    assert isinstance(pixels["image"], Image.Image)
    assert pixels["image"].size == (9, 7)
    result = await ended(poison.submit({"act": mode}, images="jpeg"))
    if isinstance(result, EncodingError):
        assert "result.image" in str(result)
        assert mode in {"float image"}
    else:
        assert result["image"]["url"].startswith("data:image/")
        assert (result["image"]["width"], result["image"]["height"]) == (9, 7)


@pytest.mark.parametrize("act", ["200 MiB tensor", "200 MiB bytes"])
async def test_results_of_200_mib(poison: DistributedRunner, act: str) -> None:
    value = next(iter((await poison.invoke({"act": act}, timeout=50)).values()))
    assert (value.nbytes if isinstance(value, torch.Tensor) else len(value)) == 200 << 20
    assert bool(value[-1] == (1 if isinstance(value, torch.Tensor) else 0))


async def test_a_stream_of_poison_ends_with_one_terminal_event(poison: DistributedRunner) -> None:
    for act in SMALL:
        payload = {"act": act, "how": "update"}
        kinds = [chunk.split(b"\n")[0] async for chunk in poison.stream(payload, as_text_events=True, timeout=30)]
        assert kinds[-1] in {b"event: result", b"event: error"}, act
        assert (kinds[-1] == b"event: error") == (act in REFUSED | NOT_JSON | {"float image"}), act
        assert set(kinds[:-1]) <= {b"event: update"}


@pytest.mark.parametrize("how", ["return", "async"])
async def test_exceptions_of_every_kind(poison: DistributedRunner, how: str) -> None:
    for act in RAISES:
        result = await ended(poison.submit({"act": act, "how": how}))
        if act.endswith("RequestCancelled"):
            assert isinstance(result, RequestCancelled), act
        elif act == "InvalidPayload":
            assert isinstance(result, InvalidPayload)
        else:
            assert isinstance(result, WorkerError), (act, result)
            assert result.rank == 0
            assert result.exception_type
        other = await ended(poison.submit({"act": act, "how": how, "rank": -1}))
        assert isinstance(other, type(result)), act


async def test_an_exception_keeps_its_name_and_text_where_it_has_any(poison: DistributedRunner) -> None:
    errors = {act: await ended(poison.submit({"act": act, "rank": 1})) for act in RAISES}
    assert errors["SystemExit"].exception_type == "SystemExit"
    assert errors["SystemExit"].message == "3"
    assert errors["unpicklable"].exception_type == "drumline.testing.poison.Unpicklable"
    assert "BrokenStr" in errors["broken str"].message
    assert errors["odd str"].message == "odd"
    assert "in _act" in errors["group"].remote_traceback
    assert {error.rank for error in errors.values() if isinstance(error, WorkerError)} == {1}
    assert len(errors["10 MiB message"].message) < 1 << 20
    assert len(errors["10 MiB message"].remote_traceback) < 1 << 20


@pytest.mark.parametrize("act", [name for name in DEEDS if "descriptors" not in name])
async def test_deeds(poison: DistributedRunner, act: str) -> None:
    result = await ended(poison.submit({"act": act, "rank": -1}))
    assert result == {"fine": True} or (act == "recursion" and isinstance(result, WorkerError))
    after = await ended(poison.submit({"act": "RGBA"}, images="jpeg"))
    assert after["image"]["width"] == 9


async def test_a_rank_without_descriptors_says_so(poison: DistributedRunner) -> None:
    """Large results need one for their memory."""
    assert await ended(poison.submit({"act": "no descriptors"})) == {"fine": True}
    result = await ended(poison.submit({"act": "300 MiB bytes"}))
    assert await ended(poison.submit({"act": "descriptors again"})) == {"fine": True}
    assert isinstance(result, EncodingError)
    assert "Too many open files" in str(result)


# -- payloads

RESERVED = {"self", "streaming"}
NAMES = [
    "func", "function", "timeout", "args", "kwargs", "payload", "rank", "request", "cls", "worker", "class", "lambda",
    "", " ", "a.b", "ü", "\n", "__class__", "__init__", "_services", "x" * 5000,
]  # fmt: skip


async def test_every_key_is_a_key(echo: DistributedRunner) -> None:
    payload: dict[str, Any] = {name: number for number, name in enumerate(NAMES)}
    assert await echo.invoke(payload) == payload
    for name in NAMES:
        assert await echo.invoke({name: 1}) == {name: 1}


@pytest.mark.parametrize("name", sorted(RESERVED))
async def test_reserved_keys_are_named(echo: DistributedRunner, name: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        await echo.invoke({name: 1, "other": 2})
    assert caught.value.detail[0]["loc"] == ["body", name]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"deeper": [value]}
    return value


PAYLOADS = {
    "deep": {"x": _nested(50_000)}, "int key": {1: "key"}, "no key": {None: 1}, "object": {"x": object()},
    "surrogate": {"x": "\ud800"}, "surrogate key": {"\ud800": 1}, "list": [1], "text": "text", "number": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", PAYLOADS)
async def test_payloads_that_are_none(echo: DistributedRunner, name: str) -> None:
    with pytest.raises(InvalidPayload):
        await asyncio.wait_for(echo.invoke(PAYLOADS[name]), 10)


async def test_numbers_that_json_does_not_have(echo: DistributedRunner) -> None:
    numbers = {"nan": math.nan, "inf": -math.inf, "huge": 10**5000, "negative": -(2**200), "tiny": 5e-324}
    result = await echo.invoke(numbers)
    assert math.isnan(result.pop("nan"))
    assert math.isnan(numbers.pop("nan"))
    assert result == numbers
    packed = await echo.submit({"x": math.nan}).result()
    with pytest.raises(EncodingError, match=r"result\.x"):
        codec.to_json(packed.data, packed.buffers)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=100),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=30,
)
ODD = JSON | st.builds(np.zeros, st.integers(0, 3)) | st.builds(torch.zeros, st.integers(0, 3)) | st.complex_numbers()


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, np.ndarray | torch.Tensor):
        return type(left) is type(right) and left.shape == right.shape
    return bool(type(left) is type(right) and left == right)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.dictionaries(st.text(max_size=30), ODD, max_size=6))
async def test_any_payload_comes_back_or_is_refused(groups: Groups, payload: dict[str, Any]) -> None:
    group = groups[Echo]
    try:
        result = await asyncio.wait_for(group.invoke(payload), 10)
    except InvalidPayload:
        assert RESERVED & payload.keys() or any(unfit(value) for value in payload.values())
    else:
        assert equal(result, payload)
    assert group.status.restarts == 0


def unfit(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(unfit, value.values()))
    if isinstance(value, list):
        return any(map(unfit, value))
    return isinstance(value, complex)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
async def test_any_request_body_is_json_or_refused(groups: Groups, text: bytes) -> None:
    try:
        payload = codec.from_json(text)
    except InvalidPayload:
        return
    assert equal(await asyncio.wait_for(groups[Echo].invoke(payload), 10), payload)
