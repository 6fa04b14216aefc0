"""The parts of a packed value that plain msgpack has no type for: their codes, their headers, where their bytes lie.

A packed value is one msgpack document. Everything beyond None, bool, 64-bit int, float, str, list and dict is a msgpack
extension with one of the codes below. An attachment (bytes, tensor, array, image) has a small header whose last field,
``content``, is either the bytes themselves or the index of a buffer that travels beside the document.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import msgspec
from typing_extensions import Buffer

from drumline.errors import EncodingError

INTEGER = 1  # big-endian two's complement
DATETIME = 2  # ISO 8601 text
DATE = 3  # ISO 8601 text
TIME = 4  # ISO 8601 text
TIMEDELTA = 5  # msgpack [days, seconds, microseconds]
DECIMAL = 6  # text
UUID = 7  # 16 bytes
BYTES = 8  # msgpack Content
TENSOR = 9  # Tensor
ARRAY = 10  # Array
PIXELS = 11  # Pixels
ENCODED = 12  # Encoded

Content = int | bytes
Descr = str | list["Field"]


class Field(msgspec.Struct, array_like=True, frozen=True):
    """One field of a structured numpy dtype: name, type, and the shape of a sub-array (empty for none)."""

    name: str
    descr: Descr
    shape: tuple[int, ...] = ()


class Tensor(msgspec.Struct, array_like=True, frozen=True):
    """A torch tensor: name of its dtype without ``torch.``, shape, elements in C order."""

    dtype: str
    shape: tuple[int, ...]
    content: Content


class Array(msgspec.Struct, array_like=True, frozen=True):
    """A numpy array: dtype as in an .npy header, shape, elements in C or Fortran order."""

    descr: Descr
    shape: tuple[int, ...]
    fortran: bool
    content: Content


class Pixels(msgspec.Struct, array_like=True, frozen=True):
    """A PIL image as raw pixels. ``palette_mode`` is empty for an image without a palette."""

    mode: str
    width: int
    height: int
    palette_mode: str
    palette: bytes
    info: dict[str, int | float | bytes | tuple[int | float, ...]]
    content: Content


class Encoded(msgspec.Struct, array_like=True, frozen=True):
    """An image file: ``content_type`` such as ``image/jpeg``, size in pixels, the file's bytes."""

    content_type: str
    width: int
    height: int
    content: Content


class HasAttachmentsError(Exception):  # a signal inside the codec
    """The document is not plain msgpack."""


def _stop(_code: int, _body: memoryview) -> Any:
    raise HasAttachmentsError


encode = msgspec.msgpack.Encoder().encode
#: Decodes documents without extensions; raises HasAttachmentsError for the others.
decode_plain = msgspec.msgpack.Decoder(ext_hook=_stop).decode
decode_content = msgspec.msgpack.Decoder(Content).decode
decode_timedelta = msgspec.msgpack.Decoder(tuple[int, int, int]).decode
decode_tensor = msgspec.msgpack.Decoder(Tensor).decode
decode_array = msgspec.msgpack.Decoder(Array).decode
decode_pixels = msgspec.msgpack.Decoder(Pixels).decode
decode_encoded = msgspec.msgpack.Decoder(Encoded).decode


def resolve(content: Content, buffers: list[Buffer]) -> Buffer:
    """Return the bytes that ``content`` stands for.

    Raises:
        EncodingError: it names a buffer that did not come along.
    """
    if isinstance(content, bytes):
        return content
    if not 0 <= content < len(buffers):
        raise EncodingError(f"the message refers to buffer {content}, but {len(buffers)} came with it")
    return buffers[content]


def rebuild_exact(code: int, body: memoryview) -> Any:
    """Return the integer, date, time, duration, decimal or UUID of an extension.

    Raises:
        EncodingError: no such code.
        ValueError: the body does not fit the code.
    """
    match code:
        case 1:
            return int.from_bytes(body, "big", signed=True)
        case 2:
            return datetime.datetime.fromisoformat(str(body, "ascii"))
        case 3:
            return datetime.date.fromisoformat(str(body, "ascii"))
        case 4:
            return datetime.time.fromisoformat(str(body, "ascii"))
        case 5:
            days, seconds, microseconds = decode_timedelta(body)
            return datetime.timedelta(days, seconds, microseconds)
        case 6:
            return decimal.Decimal(str(body, "ascii"))
        case 7:
            return uuid.UUID(bytes=bytes(body))
        case _:
            raise EncodingError(f"the message holds an extension of kind {code}, which this version does not know")
