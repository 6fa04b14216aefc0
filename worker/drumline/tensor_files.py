"""Safetensors and .npy files made by hand: what HTTP clients get for tensors and arrays, without torch or numpy.

Headers are padded to a multiple of 24 (8 for alignment, 3 for base64), so that a header and its content can be encoded
to base64 one after the other instead of being joined first.
"""

from __future__ import annotations

import json
from typing import Any

from drumline.attachments import Array, Tensor
from drumline.errors import EncodingError
from drumline.tensors import to_npy_descr

#: torch dtype -> safetensors dtype (the format's specification)
SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


def safetensors_header(header: Tensor, nbytes: int) -> bytes:
    """Return what precedes the elements in a safetensors file with the one tensor ``data``.

    Raises:
        EncodingError: safetensors has no such dtype.
    """
    dtype = SAFETENSORS_DTYPES.get(header.dtype)
    if dtype is None:
        raise EncodingError(f"a tensor of dtype {header.dtype} has no safetensors form; return it .to() another dtype")
    entry: dict[str, Any] = {"dtype": dtype, "shape": header.shape, "data_offsets": [0, nbytes]}
    text = json.dumps({"data": entry}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 24)
    return len(text).to_bytes(8, "little") + text


def npy_header(header: Array) -> bytes:
    """Return what precedes the elements in an .npy file: version 1, or 3 for long or foreign field names."""
    entry = {"descr": to_npy_descr(header.descr), "fortran_order": header.fortran, "shape": header.shape}
    text = repr(entry)
    content, version, width = text.encode(), 3, 4
    if text.isascii() and len(text) < 65000:
        version, width = 1, 2
    content += b" " * (-(8 + width + len(content) + 1) % 192) + b"\n"
    return b"\x93NUMPY" + bytes((version, 0)) + len(content).to_bytes(width, "little") + content


def dtype_name(header: Array) -> str:
    """Return the dtype as people write it: ``float32``, ``>i4`` stays as it is, fields in full."""
    descr = to_npy_descr(header.descr)
    if not isinstance(descr, str):
        return repr(descr)
    names = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
    order, kind, size = descr[0], descr[1], descr[2:]
    if order == ">" or kind not in names:
        return descr
    return "bool" if kind == "b" else f"{names[kind]}{int(size) * 8}"
