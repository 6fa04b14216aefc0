"""Torch tensors and numpy arrays <-> headers and bytes, without a copy where memory is contiguous.

Packing never imports torch or numpy: whoever holds a tensor has loaded them. Unpacking imports what the value needs.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any

from typing_extensions import Buffer

from drumline.attachments import Array, Descr, Field, Tensor, resolve
from drumline.errors import EncodingError

#: numpy kinds whose elements are plain memory: bool, integers, floats, complex, times, fixed-size strings.
_PLAIN_KINDS = frozenset("biufcmMSU")
_PLAIN_DESCR = re.compile(r"[<>|][biufcmMSUV][0-9]{1,9}(\[[0-9A-Za-z/]{1,12}\])?")


class UnfitError(Exception):  # internal: becomes an EncodingError that names the place
    """A value that has a type which can be carried, but a state which cannot; the text ends with the cure."""


def plain_tensor(tensor: Any) -> Any:
    """Return ``tensor`` detached, strided and on the CPU; it shares memory with a tensor that was so before.

    Raises:
        UnfitError: a sparse, quantised, nested, meta or distributed tensor.
    """
    torch = sys.modules["torch"]
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise UnfitError(f"a tensor of class {type(tensor).__name__}; return .full_tensor() or a plain tensor")
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_nested:
        raise UnfitError("a nested tensor; return a list of tensors")
    if tensor.is_quantized:
        raise UnfitError("a quantised tensor; return .dequantize()")
    if tensor.layout is not torch.strided:
        raise UnfitError("a sparse tensor; return .to_dense()")
    if tensor.device.type != "cpu":
        if tensor.device.type == "meta":
            raise UnfitError("a tensor on the meta device; it has no values")
        tensor = tensor.cpu()
    if tensor.dtype.is_complex:
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def copied_tensor(tensor: Any) -> Any:
    """Return a plain copy on the CPU; raises as :func:`plain_tensor`."""
    plain = plain_tensor(tensor)
    return plain.clone() if tensor.device.type == "cpu" else plain


def tensor_bytes(tensor: Any) -> tuple[str, tuple[int, ...], Buffer]:
    """Return dtype name, shape and the memory of ``tensor`` (a view of it when it is contiguous and on the CPU).

    Raises:
        UnfitError: as :func:`plain_tensor`.
    """
    tensor = plain_tensor(tensor).contiguous()
    dtype, shape, count = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.numel()
    if count == 0:
        return dtype, shape, b""
    # as_strided: a side of length 1 may have any stride and still count as contiguous. Through uint8, because numpy has
    # no bfloat16 and no float8.
    flat = tensor.as_strided((count,), (1,)).view(sys.modules["torch"].uint8)
    return dtype, shape, memoryview(flat.numpy())


def build_tensor(header: Tensor, buffers: list[Buffer]) -> Any:
    """Return the tensor; it shares the buffer's memory when that is writable and keeps the buffer alive.

    Raises:
        EncodingError: the header and the bytes do not belong together, or torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise EncodingError(f"the value holds a torch tensor, but torch cannot be imported here: {error}") from None

    dtype = getattr(torch, header.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EncodingError(f"the value holds a tensor of dtype {header.dtype!r}, which torch here lacks")
    content = _checked(resolve(header.content, buffers), header.shape, dtype.itemsize)
    if content is None:
        return torch.empty(header.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(header.shape)


def plain_array(array: Any) -> tuple[Descr, Any]:
    """Return its dtype for the wire, and ``array`` without the behaviour of a subclass.

    Raises:
        UnfitError: object, masked or extension dtypes.
    """
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(array, masked.MaskedArray):
        raise UnfitError("a masked array; return .filled(value)")
    return _descr(array.dtype), sys.modules["numpy"].asarray(array)


def copied_array(array: Any) -> Any:
    """Return a plain copy; raises as :func:`plain_array`."""
    return plain_array(array)[1].copy("K")


def array_bytes(array: Any) -> tuple[Descr, tuple[int, ...], bool, Buffer]:
    """Return dtype, shape, whether the order is Fortran's, and the memory of ``array`` (a view when contiguous).

    Raises:
        UnfitError: as :func:`plain_array`.
    """
    numpy = sys.modules["numpy"]
    descr, array = plain_array(array)
    shape = tuple(array.shape)
    if array.nbytes == 0:
        return descr, shape, False, b""
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    flat = array.T if fortran else numpy.ascontiguousarray(array)
    return descr, shape, fortran, memoryview(flat.reshape(-1).view(numpy.uint8))


def build_array(header: Array, buffers: list[Buffer]) -> Any:
    """Return the array; it shares the buffer's memory when that is writable and keeps the buffer alive.

    Raises:
        EncodingError: the header and the bytes do not belong together, or numpy is not installed.
    """
    try:
        import numpy
    except ImportError as error:
        raise EncodingError(f"the value holds a numpy array, but numpy cannot be imported here: {error}") from None

    dtype = numpy.lib.format.descr_to_dtype(to_npy_descr(header.descr))
    if dtype.hasobject:
        raise EncodingError("the message holds an array of objects, which are never carried")
    content = _checked(resolve(header.content, buffers), header.shape, dtype.itemsize)
    if content is None:
        return numpy.zeros(header.shape, dtype)
    return numpy.frombuffer(content, dtype).reshape(header.shape, order="F" if header.fortran else "C")


def to_npy_descr(descr: Descr) -> Any:
    """Return ``descr`` as ``numpy.dtype`` and the .npy format spell it: a string, or a list of tuples.

    Raises:
        EncodingError: it is not the description of plain memory.
    """
    if isinstance(descr, str):
        if not _PLAIN_DESCR.fullmatch(descr):
            raise EncodingError(f"the message holds an array of dtype {descr!r}, which is not carried")
        return descr
    return [
        (field.name, to_npy_descr(field.descr), field.shape) if field.shape else (field.name, to_npy_descr(field.descr))
        for field in descr
    ]


def _descr(dtype: Any) -> Descr:
    numpy = sys.modules["numpy"]
    if dtype.hasobject:
        raise UnfitError(f"an array of dtype {dtype}; return a list, or an array of numbers")
    if dtype.names is not None:
        return [_field(numpy, *field) for field in dtype.descr]
    if dtype.kind in _PLAIN_KINDS or dtype.type is numpy.void:
        return str(dtype.str)
    raise UnfitError(f"an array of dtype {dtype}; return it as a torch tensor or .astype() a dtype of numpy itself")


def _field(numpy: Any, name: Any, descr: Any, shape: tuple[int, ...] = ()) -> Field:
    if not isinstance(name, str):
        raise UnfitError("an array whose fields have titles; rename the fields")
    if isinstance(descr, str):
        return Field(name, descr, shape)
    return Field(name, [_field(numpy, *field) for field in descr], shape)


def _checked(content: Buffer, shape: tuple[int, ...], itemsize: int) -> Any:
    """Return writable memory of exactly the right size; None when the value has no elements."""
    expected = math.prod(shape) * itemsize
    with memoryview(content) as view:
        if min(shape, default=0) < 0 or view.nbytes != expected:
            raise EncodingError(f"the message holds {view.nbytes} bytes for shape {list(shape)} of {itemsize} bytes")
        if expected == 0:
            return None
        # Results are writable like any tensor that the user made; torch warns about read-only memory.
        return bytearray(view) if view.readonly else content
