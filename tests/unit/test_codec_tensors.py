"""Tensors and arrays: every dtype and layout, no copy on the way, and who keeps whose memory alive."""

from __future__ import annotations

import ctypes
import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from drumline import attachments
from drumline.codec import pack, snapshot, unpack
from drumline.errors import EncodingError

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
#: What torch can fill and compare; the rest are placeholders and quantised types.
USUAL = [
    dtype
    for dtype in DTYPES
    if not any(word in str(dtype) for word in ("bits", "quint", "qint", "torch.bit", "fn_x2"))
    and not (str(dtype)[-1] in "1234567" and str(dtype)[-2] == "t")
]


def carried(value: Any, **options: Any) -> Any:
    return unpack(*pack(value, **options))


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = 1
    for side in shape:
        count *= side
    generator = torch.Generator().manual_seed(count)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.numel() == 0:
        return left.dtype == right.dtype and left.shape == right.shape
    pairs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*pairs)


def test_the_usual_dtypes_are_all_there() -> None:
    names = {str(dtype)[6:] for dtype in USUAL}
    assert names >= {"bfloat16", "float8_e4m3fn", "float8_e5m2", "bool", "complex32", "complex64", "complex128"}
    assert names >= {"float16", "float32", "float64", "int8", "int16", "int32", "int64"}
    assert names >= {"uint8", "uint16", "uint32", "uint64", "float8_e8m0fnu"}


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental")
@pytest.mark.parametrize("dtype", USUAL, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5)], ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = filled(shape, dtype)
    for limit in (65536, 0):
        data, buffers = pack({"t": tensor}, inline_limit=limit)
        back = unpack(data, [bytearray(buffer) for buffer in buffers])["t"]
        assert same_bits(back, tensor)
        assert same_bits(unpack(data, buffers)["t"], tensor)
    assert same_bits(snapshot([tensor])[0], tensor)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in USUAL], ids=str)
def test_placeholder_dtypes_are_carried_or_refused(dtype: torch.dtype) -> None:
    try:
        tensor = torch.empty((4,), dtype=dtype)
    except Exception:  # this torch cannot make one, so nobody can return one
        assert not dtype.is_complex
        return
    try:
        back = carried([tensor])[0]
    except EncodingError as error:
        assert str(error).startswith("result[0]")
    else:
        assert back.dtype == dtype
        assert back.shape == tensor.shape


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).view(2, 3, 4)
    return {
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2, 1:3],
        "offset": base[1],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "channels last": torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
        "requires grad": torch.ones(3, requires_grad=True),
        "not a leaf": torch.ones(3, requires_grad=True) * 2,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "one strided item": torch.arange(6.0)[1::3][:1],
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "flipped": base.flip(0),
    }


@pytest.mark.parametrize("name", views())
def test_layouts(name: str) -> None:
    tensor = views()[name]
    back = carried({"t": tensor})["t"]
    assert torch.equal(back, tensor)
    assert type(back) is torch.Tensor
    assert not back.requires_grad
    assert not back.is_conj()
    assert torch.equal(carried(snapshot(tensor)), tensor)


def test_inference_mode() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        back = carried([tensor, snapshot(tensor)])
    assert [item.tolist() for item in back] == [[1, 1, 1]] * 2


class Labelled(torch.Tensor):
    """A user's subclass."""


class Broken(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("not today")


def test_subclasses() -> None:
    assert type(carried(torch.ones(2).as_subclass(Labelled))) is torch.Tensor
    with pytest.raises(EncodingError, match=r"^result\.a: .*Broken could not be read \(ValueError: not today\)"):
        pack({"a": torch.ones(2).as_subclass(Broken)})


def refused() -> dict[str, tuple[torch.Tensor, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        csr = torch.eye(2).to_sparse_csr()
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    return {
        "sparse": (torch.eye(2).to_sparse(), "a sparse tensor cannot be carried; return .to_dense()"),
        "csr": (csr, "a sparse tensor"),
        "quantised": (quantised, "a quantised tensor cannot be carried; return .dequantize()"),
        "nested": (nested, "a nested tensor"),
        "meta": (torch.ones(2, device="meta"), "a tensor on the meta device cannot be carried"),
    }


@pytest.mark.parametrize("name", refused())
def test_refused_tensors(name: str) -> None:
    tensor, message = refused()[name]
    for carry in (pack, lambda value: snapshot(value, path="result")):
        with pytest.raises(EncodingError) as caught:
            carry({"a": [tensor]})
        assert str(caught.value).startswith("result.a[0]: ")
        assert message in str(caught.value)


def test_a_large_tensor_is_not_copied() -> None:
    tensor = torch.zeros(3, 100, 100)
    _, (buffer,) = pack({"t": tensor})
    tensor[2, 99, 99] = 1
    assert np.frombuffer(buffer, np.float32)[-1] == 1
    array = np.zeros((100, 1000), order="F")
    _, (buffer,) = pack({"a": array})
    array[1, 0] = 1
    assert np.frombuffer(buffer, np.float64)[1] == 1


class Lease(ctypes.c_uint8 * 80_000):  # type: ignore[misc]
    """A buffer whose end somebody waits for, as a shared-memory segment."""


@pytest.mark.parametrize("make", [lambda: torch.arange(10_000), lambda: np.arange(10_000)], ids=["torch", "numpy"])
@pytest.mark.parametrize("wrap", [lambda lease: lease, memoryview], ids=["object", "memoryview"])
def test_the_result_keeps_its_buffer_alive_and_frees_it(make: Any, wrap: Any) -> None:
    data, (content,) = pack({"v": make()})
    lease = Lease.from_buffer_copy(content)
    released = weakref.ref(lease)
    value = unpack(data, [wrap(lease)])["v"]
    address = ctypes.addressof(lease)
    del lease, content
    gc.collect()
    assert released() is not None
    pointer = value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data
    assert pointer == address  # no copy
    part = value[5:]
    value[5] = 77  # writable
    del value
    gc.collect()
    assert released() is not None
    assert part[0] == 77
    del part
    gc.collect()
    assert released() is None


@pytest.mark.parametrize(
    "value", [b"x" * 80_000, pytest.param(None, id="image")], ids=lambda value: "bytes" if value else "image"
)
def test_bytes_and_images_let_their_buffer_go(value: Any) -> None:
    from PIL import Image

    value = value or Image.new("L", (400, 200), 7)
    data, (content,) = pack([value])
    lease = Lease.from_buffer_copy(content)
    released = weakref.ref(lease)
    back = unpack(data, [lease])
    del lease
    gc.collect()
    assert released() is None
    assert back == [value]


def test_read_only_memory_gives_writable_results() -> None:
    data, buffers = pack({"t": torch.zeros(20_000), "a": np.zeros(20_000), "s": torch.zeros(2), "r": np.zeros(2)})
    for kind in (bytes, lambda buffer: memoryview(bytes(buffer))):
        back = unpack(data, [kind(buffer) for buffer in buffers])
        for value in back.values():
            value[0] = 1
            assert value[0] == 1
            assert value[1] == 0


ARRAYS = [
    np.array(3.5),
    np.zeros((0, 4), np.int16),
    np.array([True, False]),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.arange(6, dtype="<u8").reshape(2, 3),
    np.arange(24.0).reshape(2, 3, 4).transpose(2, 1, 0),
    np.arange(24, dtype=np.float16).reshape(4, 6)[::2, ::-1],
    np.array([1 + 2j], np.complex64),
    np.array([1.5], np.longdouble),
    np.array(["2020-01-01", "NaT"], "M8[D]"),
    np.array([1, 2], "m8[25s]"),
    np.array(["ä", "bcd"]),
    np.array([b"a", b"bcd"]),
    np.array([b"abc"], "V3"),
    np.array([(1, [2.0, 3.0], (b"x",))], [("a", "<i4"), ("b", ">f8", (2,)), ("c", [("d", "S2")])]),
    np.zeros(2, np.dtype({"names": ["x"], "formats": ["<i2"], "offsets": [6], "itemsize": 12})),
    np.broadcast_to(np.arange(3), (4, 3)),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.array([], "U0"),
    np.arange(4.0)[1::2][:1],
    np.arange(4.0)[1::2][:1].reshape(1, 1).T,
    np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays(array: Any) -> None:
    for limit in (65536, 0):
        back = carried({"a": array}, inline_limit=limit)["a"]
        assert type(back) is np.ndarray
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(array).tobytes()
    assert carried(snapshot(array)).dtype == array.dtype


def test_fortran_order_is_kept() -> None:
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    assert carried(array).flags.f_contiguous


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([object()]), "an array of dtype object cannot be carried"),
        (np.array([(1, None)], [("a", "i4"), ("b", "O")]), "cannot be carried"),
        (np.ma.masked_array([1, 2], [True, False]), r"a masked array cannot be carried; return \.filled"),
        (np.array(["a"], np.dtypes.StringDType()), "cannot be carried"),
    ],
    ids=["object", "object field", "masked", "string dtype"],
)
def test_refused_arrays(array: Any, message: str) -> None:
    for carry in (pack, snapshot):
        with pytest.raises(EncodingError, match=message):
            carry({"a": array})


def document(code: int, header: Any) -> bytes:
    from msgspec.msgpack import Ext

    return attachments.encode([Ext(code, attachments.encode(header))])


@pytest.mark.parametrize(
    ("code", "header"),
    [
        (attachments.TENSOR, attachments.Tensor("float32", (3,), b"12345678")),
        (attachments.TENSOR, attachments.Tensor("float32", (-1,), b"")),
        (attachments.TENSOR, attachments.Tensor("float32", (1 << 62, 1 << 62), b"")),
        (attachments.TENSOR, attachments.Tensor("float32", (1 << 62, 1 << 62, 0), b"")),
        (attachments.TENSOR, attachments.Tensor("load", (), b"")),
        (attachments.TENSOR, attachments.Tensor("__dict__", (), b"")),
        (attachments.TENSOR, attachments.Tensor("float32", (1,), 0)),
        (attachments.TENSOR, attachments.Tensor("float32", (1,), -1)),
        (attachments.TENSOR, ("float32", "1", b"")),
        (attachments.TENSOR, ("float32", [2**70 // 2**10], b"")),
        (attachments.ARRAY, attachments.Array("|O", (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array("O", (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array("i4,O", (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array([attachments.Field("a", "|O")], (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array([attachments.Field("a", "<i4")] * 2, (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array([attachments.Field("a", "<i4", (-1,))], (1,), False, b"1234")),
        (attachments.ARRAY, attachments.Array("<i3", (1,), False, b"123")),
        (attachments.ARRAY, attachments.Array("<M8[5]", (1,), False, b"12345678")),
        (attachments.ARRAY, attachments.Array("<f4", (2,), True, b"1234")),
        (attachments.ARRAY, attachments.Array("<f4", (1 << 62, 1 << 62, 0), True, b"")),
    ],
)
def test_forged_headers(code: int, header: Any) -> None:
    with pytest.raises(EncodingError):
        unpack(document(code, header), [])
