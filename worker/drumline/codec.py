"""Values <-> wire: what a payload, a result or an update becomes between processes.

``pack`` makes one msgpack document and a list of buffers: parts above ``inline_limit`` bytes (tensors, arrays, images,
bytes) stay where they are and travel beside the document, so that a channel can move them without one more copy.
``unpack`` is its inverse, ``to_json`` gives the same value to HTTP clients without importing torch, numpy or PIL, and
``from_json`` reads what they send. Nothing here uses pickle: damaged or hostile bytes are an ``EncodingError``.

How types are carried: tuples, sets and deques become lists; dataclasses, pydantic models and msgspec structs become
dicts; enums their value; numpy scalars Python numbers; paths texts. Tensors arrive on the CPU, detached.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any, NamedTuple

import msgspec
from msgspec.msgpack import Ext
from typing_extensions import Buffer

from drumline import attachments, images, tensors
from drumline.errors import EncodingError
from drumline.images import EncodedImage
from drumline.json_text import from_json, to_json
from drumline.traversal import Walker, is_plain, safe_text

__all__ = ["Buffer", "EncodedImage", "Packed", "from_json", "pack", "snapshot", "to_json", "unpack"]

_encode = attachments.encode
_packed = tuple.__new__  # a third of the time of Packed(...)

INLINE_LIMIT = 65536
RESULT_QUALITY = 95


class Packed(NamedTuple):
    """A value on its way: the msgpack document, and the large parts that travel beside it."""

    data: bytes
    buffers: list[Buffer]


def pack(
    value: Any,
    *,
    images: str = "pixels",
    quality: int = RESULT_QUALITY,
    path: str = "result",
    inline_limit: int = INLINE_LIMIT,
) -> Packed:
    """Turn ``value`` into a document and buffers.

    The buffers are views of the value's own memory where that is contiguous: do not change the value before they are
    sent (see :func:`snapshot`).

    Args:
        value: numbers, texts, bytes, lists, dicts, dates, tensors, arrays, images ... in any nesting.
        images: ``pixels`` keeps PIL images as they are; ``jpeg``, ``png`` or ``webp`` encodes them here.
        quality: 1-100, for JPEG and WebP.
        path: what error messages call the value.
        inline_limit: parts with more bytes than this become buffers.

    Raises:
        EncodingError: something in it cannot be carried; the message names its place and the cure.
    """
    careful = False
    try:
        if is_plain(value):
            return _packed(Packed, (_encode(value), []))
    except (OverflowError, UnicodeEncodeError):
        careful = True  # an integer beyond 64 bits or a lone surrogate
    except (RecursionError, MemoryError, RuntimeError) as error:
        raise EncodingError(f"{path}: cannot be read: {safe_text(error)}") from error
    while True:
        packer = _Packer(path, images, quality, inline_limit, careful=careful)
        plain = packer.run(value)
        try:
            return Packed(attachments.encode(plain), packer.buffers)
        except (OverflowError, UnicodeEncodeError) as error:
            if careful:
                raise EncodingError(f"{path}: cannot be carried: {safe_text(error)}") from error
            careful = True
        except Exception as error:
            raise EncodingError(f"{path}: cannot be carried: {safe_text(error)}") from error


def unpack(data: Buffer, buffers: list[Buffer] | tuple[Buffer, ...] = ()) -> Any:
    """Rebuild a value.

    Tensors and arrays share the memory of a writable buffer and keep that object alive; read-only memory is copied
    once. Bytes and images have their own memory.

    Raises:
        EncodingError: the data is damaged, or a package that the value needs is not installed.
    """
    try:
        return attachments.decode_plain(data)
    except attachments.HasAttachmentsError:
        pass
    except Exception as error:
        raise EncodingError(f"the message is damaged: {safe_text(error)}") from error
    held = list(buffers)
    try:
        return msgspec.msgpack.decode(data, ext_hook=lambda code, body: _rebuild(code, body, held))
    except EncodingError:
        raise
    except Exception as error:
        raise EncodingError(f"the message is damaged: {safe_text(error)}") from error


def snapshot(value: Any, *, path: str = "update") -> Any:
    """Return a copy that shares nothing changeable with ``value``, to be packed later in another thread.

    Containers, tensors (to the CPU), arrays, images and bytearrays are copied; objects become what :func:`pack` makes
    of them anyway (a dataclass becomes a dict).

    Raises:
        EncodingError: as :func:`pack`, and at the same places.
    """
    try:
        if is_plain(value):
            return attachments.decode_plain(attachments.encode(value))
    except Exception:  # noqa: S110 - the walk below finds out what is wrong and where
        pass
    return _Copier(path).run(value)


class _Packer(Walker):
    def __init__(self, path: str, images_as: str, quality: int, inline_limit: int, *, careful: bool) -> None:
        super().__init__(path, careful=careful)
        self.buffers: list[Buffer] = []
        self._format = images.image_format(images_as)
        self._quality = quality
        self._inline_limit = inline_limit

    def _content(self, content: Buffer) -> attachments.Content:
        view = memoryview(content)
        if view.nbytes <= self._inline_limit:
            return view.tobytes()
        self.buffers.append(content)
        return len(self.buffers) - 1

    def bytes_(self, value: Any) -> Ext:
        view = memoryview(value)
        if not view.c_contiguous:
            value = view.tobytes()
        return Ext(attachments.BYTES, attachments.encode(self._content(value)))

    def tensor(self, value: Any) -> Ext:
        dtype, shape, content = tensors.tensor_bytes(value)
        return Ext(attachments.TENSOR, attachments.encode(attachments.Tensor(dtype, shape, self._content(content))))

    def array(self, value: Any) -> Ext:
        descr, shape, fortran, content = tensors.array_bytes(value)
        header = attachments.Array(descr, shape, fortran, self._content(content))
        return Ext(attachments.ARRAY, attachments.encode(header))

    def image(self, value: Any) -> Ext:
        if self._format is not None:
            content_type, file = images.encode_image(value, self._format, self._quality)
            return self.encoded(EncodedImage(content_type, value.width, value.height, file))
        header = images.image_pixels(value)
        assert isinstance(header.content, bytes)
        header = msgspec.structs.replace(header, content=self._content(header.content))
        return Ext(attachments.PIXELS, attachments.encode(header))

    def encoded(self, value: EncodedImage) -> Ext:
        header = attachments.Encoded(value.content_type, value.width, value.height, self._content(value.data))
        return Ext(attachments.ENCODED, attachments.encode(header))

    def exact(self, value: Any) -> Ext:
        return Ext(*_exact_form(value))


class _Copier(Walker):
    def bytes_(self, value: Any) -> bytes:
        return bytes(value)

    def tensor(self, value: Any) -> Any:
        return tensors.copied_tensor(value)

    def array(self, value: Any) -> Any:
        return tensors.copied_array(value)

    def image(self, value: Any) -> Any:
        return value.copy()

    def encoded(self, value: EncodedImage) -> EncodedImage:
        return value

    def exact(self, value: Any) -> Any:
        return value


def _exact_form(value: Any) -> tuple[int, bytes]:
    if isinstance(value, int):
        return attachments.INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    if isinstance(value, datetime.datetime):
        return attachments.DATETIME, value.isoformat().encode()
    if isinstance(value, datetime.date):
        return attachments.DATE, value.isoformat().encode()
    if isinstance(value, datetime.time):
        return attachments.TIME, value.isoformat().encode()
    if isinstance(value, datetime.timedelta):
        return attachments.TIMEDELTA, attachments.encode((value.days, value.seconds, value.microseconds))
    if isinstance(value, decimal.Decimal):
        return attachments.DECIMAL, str(value).encode()
    assert isinstance(value, uuid.UUID)
    return attachments.UUID, value.bytes


def _rebuild(code: int, body: memoryview, buffers: list[Buffer]) -> Any:
    if code == attachments.TENSOR:
        return tensors.build_tensor(attachments.decode_tensor(body), buffers)
    if code == attachments.ARRAY:
        return tensors.build_array(attachments.decode_array(body), buffers)
    if code == attachments.PIXELS:
        return images.build_image(attachments.decode_pixels(body), buffers)
    if code == attachments.ENCODED:
        header = attachments.decode_encoded(body)
        data = bytes(attachments.resolve(header.content, buffers))
        return EncodedImage(header.content_type, header.width, header.height, data)
    if code == attachments.BYTES:
        return bytes(attachments.resolve(attachments.decode_content(body), buffers))
    return attachments.rebuild_exact(code, body)
