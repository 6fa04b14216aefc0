"""Files out of results: every ``{"url": ...}`` of an image, tensor or array becomes a file on this machine."""

from __future__ import annotations

import base64
import binascii
import contextlib
import mimetypes
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from drumline.errors import ConnectionFailed, EncodingError

_SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "application/octet-stream": ".bin",
    "application/x-npy": ".npy",
    "application/safetensors": ".safetensors",
    "application/vnd.safetensors": ".safetensors",
}
_SAFE_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")
_LARGEST_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class Saved:
    """What :func:`save_images` did; unpacks as ``result, files``.

    Attributes:
        result: the result with each saved ``url`` replaced by the file's path.
        files: the files, in the order in which they stand in the result.
    """

    result: Any
    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.result, self.files))


def save_images(result: Any, folder: str | os.PathLike[str] = ".", prefix: str = "image") -> Saved:
    """Write the files of a result: data URIs, and http(s) URLs that name a content type, are fetched.

    Args:
        result: of ``invoke``, or an event's ``data``. It is not changed.
        folder: where to; it is made when there is something to write.
        prefix: the files are ``<prefix>.jpg``, or ``<prefix>-0.jpg``, ``<prefix>-1.png``, ... when there are several.
            Files of these names are replaced.

    Returns:
        The result with paths in place of the URLs, and the paths.

    Raises:
        EncodingError: a data URI that cannot be read; the message says which one.
        ConnectionFailed: a URL that cannot be fetched.
        OSError: the folder cannot be written.
    """
    found = list(_files(result, "result"))
    paths: dict[int, Path] = {}
    for number, (place, entry) in enumerate(found):
        data, content_type = _content(place, entry)
        name = prefix if len(found) == 1 else f"{prefix}-{number}"
        path = Path(folder, name + _suffix(entry, content_type))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever looks at the file meanwhile (a viewer that follows previews) sees the old one or the new one.
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        paths[id(entry)] = path
    return Saved(_with_paths(result, paths), tuple(paths.values()))


def _files(value: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        url = value.get("url")
        if isinstance(url, str) and (url.startswith("data:") or _is_remote_file(url, value)):
            yield place, value
            return
        for name, item in value.items():
            yield from _files(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _files(item, f"{place}[{number}]")


def _is_remote_file(url: str, entry: Mapping[str, Any]) -> bool:
    return url.startswith(("http://", "https://")) and isinstance(entry.get("content_type"), str)


def _with_paths(value: Any, paths: Mapping[int, Path]) -> Any:
    if isinstance(value, Mapping):
        if id(value) in paths:
            return {**value, "url": str(paths[id(value)])}
        return {name: _with_paths(item, paths) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths(item, paths) for item in value]
    return value


def _content(place: str, entry: Mapping[str, Any]) -> tuple[bytes, str]:
    url: str = entry["url"]
    if not url.startswith("data:"):
        return _fetch(place, url), str(entry["content_type"])
    head, comma, body = url[5:].partition(",")
    media, *parameters = head.split(";")
    if not comma:
        raise EncodingError(f"{place}.url: a data URI without a comma")
    try:
        data = base64.b64decode(body, validate=True) if "base64" in parameters else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise EncodingError(f"{place}.url: a data URI that is not base64: {error}") from None
    return data, media or str(entry.get("content_type") or "text/plain")


def _fetch(place: str, url: str) -> bytes:
    import httpx2

    data = bytearray()
    try:
        # A client of its own: no API key goes to wherever a result points.
        with httpx2.stream("GET", url, timeout=30.0, follow_redirects=True) as response:
            if response.status_code >= 400:
                raise ConnectionFailed(f"{place}.url: {url} answered {response.status_code}", sent=True)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > _LARGEST_FILE:
                    raise ConnectionFailed(f"{place}.url: {url} is larger than {_LARGEST_FILE} bytes", sent=True)
    except httpx2.HTTPError as error:
        raise ConnectionFailed(f"{place}.url: cannot fetch {url}: {error}", sent=True) from error
    return bytes(data)


def _suffix(entry: Mapping[str, Any], content_type: str) -> str:
    media = content_type.partition(";")[0].strip().lower()
    url = str(entry["url"])
    named = "" if url.startswith("data:") else Path(urlsplit(url).path).suffix
    for suffix in (_SUFFIXES.get(media), mimetypes.guess_extension(media), named):
        if suffix and _SAFE_SUFFIX.fullmatch(suffix):
            return suffix
    return ".bin"
