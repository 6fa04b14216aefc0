"""Where files of responses are kept: in the response itself (a data URI), in a directory, or in an S3 bucket."""

from __future__ import annotations

import base64
import functools
import os
import uuid
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qs, quote, urlsplit

from drumline.errors import ConfigurationError

VARIABLE = "DRUMLINE_FILES"
#: What fal's names for its own storage mean here: the configured default.
_DEFAULTS = frozenset({"", "default", "fal", "fal_v2", "fal_v3", "cdn"})
_EXPIRES = 7 * 24 * 3600


@runtime_checkable
class Repository(Protocol):
    """Keeps files."""

    def save(self, data: bytes, content_type: str, file_name: str) -> str:
        """Keep ``data`` and return a URL under which whoever gets the response can read it."""


class DataRepository:
    """Puts the file into its URL: nothing to set up, nothing to clean up, a third more bytes."""

    def save(self, data: bytes, content_type: str, file_name: str) -> str:
        """Return a data URI; ``file_name`` is not in it."""
        del file_name
        return f"data:{content_type};base64,{base64.b64encode(data).decode('ascii')}"


class DirectoryRepository:
    """Writes files to a directory, e.g. a shared volume that a web server shows.

    Args:
        directory: made when it is missing.
        url: base of the URLs; None: ``file:`` URLs, for callers on the same machine.
    """

    def __init__(self, directory: str | Path, url: str | None = None) -> None:
        self._directory = Path(directory).absolute()
        self._url = url.rstrip("/") if url else None

    def save(self, data: bytes, content_type: str, file_name: str) -> str:
        """Write a file under a random name with the suffix of ``file_name``; readers never see half of it."""
        del content_type
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / _random_name(file_name)
        partial = path.with_name(f".{path.name}.part")
        partial.write_bytes(data)
        partial.replace(path)
        return f"{self._url}/{path.name}" if self._url else path.as_uri()


class S3Repository:
    """Uploads files to an S3-compatible bucket with boto3 (extra ``drumline[s3]``), which finds credentials as usual.

    Args:
        bucket: its name.
        prefix: key prefix, without slashes at the ends.
        url: public base URL of ``prefix``; None: signed URLs.
        endpoint: of an S3-compatible service; None: what boto3 is configured for.
        expires: seconds that a signed URL works, at most a week.

    Raises:
        ConfigurationError: boto3 is not installed.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        url: str | None = None,
        endpoint: str | None = None,
        expires: int = _EXPIRES,
    ) -> None:
        try:
            import boto3
        except ImportError:
            raise ConfigurationError("an S3 repository needs boto3: pip install 'drumline[s3]'") from None
        self._client: Any = boto3.client("s3", endpoint_url=endpoint)
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._url = url.rstrip("/") if url else None
        self._expires = expires

    def save(self, data: bytes, content_type: str, file_name: str) -> str:
        """Upload under a random key with the suffix of ``file_name``."""
        name = _random_name(file_name)
        key = f"{self._prefix}/{name}" if self._prefix else name
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data, ContentType=content_type)
        if self._url:
            return f"{self._url}/{quote(name)}"
        signed: str = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=self._expires
        )
        return signed


def repository_for(wanted: Repository | str | None) -> Repository:
    """Return the repository that is asked for.

    Args:
        wanted: a repository; ``in_memory``; a specification as below; None and fal's names: the default, which is the
            specification in the environment variable ``DRUMLINE_FILES``, else data URIs.

    ========================================================= ===================================================
    ``data:``                                                 data URIs
    ``dir:/srv/files?url=https://files.example.com``          a directory; without ``url``: file URLs
    ``s3://bucket/prefix?url=...&endpoint=...&expires=3600``  a bucket; without ``url``: signed URLs
    ========================================================= ===================================================

    Raises:
        ConfigurationError: the specification is wrong.
    """
    if wanted is not None and not isinstance(wanted, str):
        return wanted
    if wanted == "in_memory":
        return _built("data:")
    if wanted is None or wanted in _DEFAULTS:
        return _built(os.environ.get(VARIABLE) or "data:")
    return _built(wanted)


@functools.lru_cache(maxsize=16)
def _built(specification: str) -> Repository:
    parts = urlsplit(specification)
    allowed = {"data": set[str](), "dir": {"url"}, "s3": {"url", "endpoint", "expires"}}.get(parts.scheme)
    options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if allowed is None or not options.keys() <= allowed:
        unknown = f"; it takes {', '.join(sorted(allowed)) or 'no options'}" if allowed is not None else ""
        raise ConfigurationError(
            f"file repository {specification!r}: write data:, dir:/folder[?url=...] or s3://bucket[/prefix][?...]{unknown}"
        )
    if parts.scheme == "data":
        return DataRepository()
    if parts.scheme == "dir":
        if not parts.path:
            raise ConfigurationError(f"file repository {specification!r}: the folder is missing; write dir:/folder")
        return DirectoryRepository(parts.path, options.get("url"))
    if not parts.netloc:
        raise ConfigurationError(f"file repository {specification!r}: the bucket is missing; write s3://bucket")
    try:
        expires = int(options.get("expires", _EXPIRES))
    except ValueError:
        raise ConfigurationError(f"file repository {specification!r}: expires is a number of seconds") from None
    return S3Repository(
        parts.netloc, parts.path, url=options.get("url"), endpoint=options.get("endpoint"), expires=expires
    )


def _random_name(file_name: str) -> str:
    """A name that nobody can guess or collide with; only a harmless suffix is taken over."""
    suffix = PurePosixPath(file_name).suffix
    return uuid.uuid4().hex + (suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 10 else "")
