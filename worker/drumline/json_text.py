"""Packed values -> JSON for HTTP clients, and strict JSON -> payloads. Imports no torch, numpy or PIL.

Attachments become ``{"url": "data:<type>;base64,...", "content_type": ...}``: image files as they are, tensors as
safetensors, arrays as .npy, bytes as ``application/octet-stream``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
from typing_extensions import Buffer

from drumline import attachments, images, tensor_files
from drumline.errors import EncodingError, InvalidJson
from drumline.traversal import place, safe_text

#: Deepest nesting of a request's body.
MAX_JSON_DEPTH = 200

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
#: A NaN or an infinity in msgpack; may also match inside other data, so a match is looked at again.
_NONFINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
#: Line ends for those clients that split an event stream with ``str.splitlines``.
_LINE_ENDS = ((b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"), (b"\xc2\x85", rb"\u0085"))


def to_json(data: Buffer, buffers: list[Buffer] | tuple[Buffer, ...] = (), *, path: str = "result") -> bytes:
    """Return the value as one line of valid JSON.

    Dates become ISO 8601 texts, decimals and UUIDs texts, integers of any size numbers, integer keys texts.

    Raises:
        EncodingError: JSON cannot carry it (NaN, infinity, a dtype without a file form), or the data is damaged.
    """
    try:
        try:
            value = attachments.decode_plain(data)
            text = _encode(value)
            suspicious = b"null" in text  # msgspec writes NaN and infinities as null, silently
        except attachments.HasAttachmentsError:
            value = _with_files(data, list(buffers), path)
            text = _encode(value)
            suspicious = True  # the text is long, the data short: search in the data only
        if suspicious and _NONFINITE.search(data):
            _refuse_nonfinite(value, path)
    except EncodingError:
        raise
    except Exception as error:
        raise EncodingError(f"{path}: JSON cannot carry it: {safe_text(error)}") from error
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            text = text.replace(raw, escaped)
    return text


def from_json(body: Buffer) -> dict[str, Any]:
    """Read a request's body: one JSON object, strictly. Of equal keys the last wins.

    Raises:
        InvalidJson: anything else; the message says what is wrong and at which byte.
    """
    try:
        value = _decode(body)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise _bad_utf8(bytes(body)) from None
    except msgspec.DecodeError as error:
        raise _malformed(str(error), bytes(body)) from None
    if type(value) is not dict:
        raise InvalidJson(f"the body must be a JSON object such as {{}}, not {_JSON_NAMES[type(value)]}")
    raw = body if isinstance(body, bytes | bytearray) else bytes(body)
    if raw.count(b"{") + raw.count(b"[") > MAX_JSON_DEPTH and _deeper_than(value, MAX_JSON_DEPTH):
        raise _too_deep()
    return value


_JSON_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
_JSON_NAMES[type(None)] = "null"


def _too_deep() -> InvalidJson:
    return InvalidJson(f"the body is nested deeper than {MAX_JSON_DEPTH} levels")


def _bad_utf8(body: bytes) -> InvalidJson:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return InvalidJson(f"the body is not UTF-8: {error.reason} (byte {error.start})", position=error.start)
    return InvalidJson("the body holds an escaped half of a surrogate pair, which stands for no character")


def _malformed(message: str, body: bytes) -> InvalidJson:
    if not body.strip():
        return InvalidJson("the body is empty; send a JSON object such as {}", position=0)
    found = re.search(r"\(byte (\d+)\)$", message)
    message = message.removeprefix("JSON is malformed: ")
    for literal in ("NaN", "Infinity"):
        if found and body.startswith(literal.encode(), int(found[1])):
            message = f"{literal} is not JSON; use null or a string (byte {found[1]})"
    if message.startswith("Input data was truncated"):
        return InvalidJson(f"the body ends too early (byte {len(body)})", position=len(body))
    return InvalidJson(f"the body is not valid JSON: {message}", position=int(found[1]) if found else None)


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return True


class _Unusable:
    """Stands in the value for an attachment that has no JSON form, until its place is known."""

    def __init__(self, message: str) -> None:
        self.message = message


def _with_files(data: Buffer, buffers: list[Buffer], path: str) -> Any:
    unusable: list[_Unusable] = []

    def hook(code: int, body: memoryview) -> Any:
        try:
            return _file(code, body, buffers)
        except EncodingError as error:
            unusable.append(_Unusable(str(error)))
            return unusable[-1]

    value = msgspec.msgpack.decode(data, ext_hook=hook)
    if unusable:
        found = _find(value, lambda item: item is unusable[0])
        raise EncodingError(f"{place(path, found[0] if found else [])}: {unusable[0].message}")
    return value


def _file(code: int, body: memoryview, buffers: list[Buffer]) -> Any:
    """Return the JSON form of one extension: a ready-made piece of JSON, or a value that msgspec writes correctly."""
    if code == attachments.ENCODED:
        image = attachments.decode_encoded(body)
        content = attachments.resolve(image.content, buffers)
        return _fragment(image.content_type, (content,), width=image.width, height=image.height)
    if code == attachments.PIXELS:
        pixels = attachments.decode_pixels(body)
        png = images.pixels_to_png(pixels, buffers)
        return _fragment("image/png", (png,), width=pixels.width, height=pixels.height)
    if code == attachments.TENSOR:
        tensor = attachments.decode_tensor(body)
        content = attachments.resolve(tensor.content, buffers)
        head = tensor_files.safetensors_header(tensor, memoryview(content).nbytes)
        return _fragment("application/safetensors", (head, content), dtype=tensor.dtype, shape=tensor.shape)
    if code == attachments.ARRAY:
        array = attachments.decode_array(body)
        content = attachments.resolve(array.content, buffers)
        head = tensor_files.npy_header(array)
        dtype = tensor_files.dtype_name(array)
        return _fragment("application/x-npy", (head, content), dtype=dtype, shape=array.shape)
    if code == attachments.BYTES:
        content = attachments.resolve(attachments.decode_content(body), buffers)
        return _fragment("application/octet-stream", (content,))
    return attachments.rebuild_exact(code, body)


def _fragment(content_type: str, pieces: tuple[Buffer, ...], **extra: Any) -> msgspec.Raw:
    """Return ``{"url": "data:...", ...}`` as bytes; every piece but the last has a length that 3 divides."""
    details = {"content_type": content_type, **extra, "file_size": sum(memoryview(piece).nbytes for piece in pieces)}
    return msgspec.Raw(
        b"".join(
            (
                b'{"url":',
                _encode(f"data:{content_type};base64,")[:-1],
                # msgspec writes bytes as base64, twice as fast as binascii does
                *(memoryview(_encode(memoryview(piece)))[1:-1] for piece in pieces),
                b'",',
                _encode(details)[1:],
            )
        )
    )


def _refuse_nonfinite(value: Any, path: str) -> None:
    found = _find(value, lambda item: type(item) is float and not math.isfinite(item))
    if found is not None:
        parts, number = found
        name = "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
        raise EncodingError(f"{place(path, parts)}: {name} cannot be carried by JSON; return null or a string")


def _find(value: Any, wanted: Callable[[Any], bool]) -> tuple[list[str | int], Any] | None:
    """Return the way to the first wanted item (innermost part first) and the item; None when there is none."""
    if wanted(value):
        return [], value
    items = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else ()
    for key, item in items:
        if type(item) in (dict, list, tuple) or wanted(item):
            found = _find(item, wanted)
            if found is not None:
                found[0].append(key)
                return found
    return None
