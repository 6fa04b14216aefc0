"""``File`` and ``Image``: pydantic models that stand for bytes somewhere, by their URL."""

from __future__ import annotations

import io
import mimetypes
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, PrivateAttr, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from drumline.details import problem
from drumline.errors import EncodingError, InvalidPayload
from drumline.images import encode_image, image_format
from drumline.tensors import UnfitError
from drumline.toolkit.fetch import DEFAULT_TIMEOUT, MAX_BYTES, decode_data_uri, fetch
from drumline.toolkit.repositories import Repository, repository_for

if TYPE_CHECKING:
    from PIL import Image as PILImage

_BINARY = "application/octet-stream"
#: Quality of JPEG and WebP files that Image.from_pil makes.
_QUALITY = 95


class File(BaseModel):
    """A file by its URL. A plain URL string is accepted in its place.

    Attributes:
        url: ``https:``, ``http:`` or ``data:``; ``file:`` only for files that this process has saved.
        content_type: its media type, if known.
        file_name: a name to save it under, if known.
        file_size: bytes, if known.
    """

    model_config = ConfigDict(json_schema_extra={"description": "A file by its URL.", "ui": {"field": "file"}})

    url: str = Field(description="Where the file is: an https or data URL.", examples=["https://example.com/cat.png"])
    content_type: str | None = Field(default=None, description="Media type of the file.", examples=["image/png"])
    file_name: str | None = Field(default=None, description="Name of the file.", examples=["cat.png"])
    file_size: int | None = Field(default=None, description="Size in bytes.", examples=[4404019])

    _data: bytes | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if _scheme(value) not in {"http", "https", "data"}:
            raise ValueError("a file is given as an http, https or data URL")
        return {"url": value}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A request may hold a URL in the file's place; the schema says so."""
        schema = handler(core_schema)
        if handler.mode == "serialization":
            return schema
        url = {"type": "string", "format": "uri", "description": "URL of the file."}
        return {"title": schema["title"], "anyOf": [schema, url], "ui": schema["ui"]}

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        content_type: str | None = None,
        file_name: str | None = None,
        repository: Repository | str | None = None,
        request: Any = None,
    ) -> Self:
        """Save ``data`` in a repository.

        Args:
            data: the file.
            content_type: media type; default: from ``file_name``, else ``application/octet-stream``.
            file_name: default: a random one.
            repository: where to; default: what ``DRUMLINE_FILES`` says, else a data URI.
            request: accepted for fal's sake.

        Raises:
            ConfigurationError: ``repository`` or ``DRUMLINE_FILES`` is wrong.
        """
        del request
        content_type = content_type or (mimetypes.guess_type(file_name)[0] if file_name else None) or _BINARY
        name = file_name or f"{uuid.uuid4().hex}{mimetypes.guess_extension(content_type) or '.bin'}"
        url = repository_for(repository).save(data, content_type, name)
        file = cls(url=url, content_type=content_type, file_name=name, file_size=len(data))
        file._data = data
        return file

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        content_type: str | None = None,
        repository: Repository | str | None = None,
        request: Any = None,
    ) -> Self:
        """Save a file of this machine in a repository; arguments as :meth:`from_bytes`.

        Raises:
            OSError: it cannot be read.
        """
        source = Path(path)
        return cls.from_bytes(source.read_bytes(), content_type, source.name, repository, request)

    def as_bytes(
        self, *, max_bytes: int = MAX_BYTES, timeout: float = DEFAULT_TIMEOUT, allow_private: bool | None = None
    ) -> bytes:
        """Return the bytes, downloading them when they are elsewhere. Blocks: in async code use ``asyncio.to_thread``.

        Args:
            max_bytes: larger files are refused.
            timeout: seconds for the whole download, redirects included.
            allow_private: also fetch from loopback and private addresses; default: what the environment variable
                ``DRUMLINE_ALLOW_PRIVATE_URLS`` says, else no.

        Raises:
            InvalidPayload: the URL is malformed, refused or does not answer, or the file is too large.
        """
        if self._data is not None:
            return self._data
        scheme = _scheme(self.url)
        if scheme == "data":
            self._data = decode_data_uri(self.url, max_bytes=max_bytes)[0]
        elif scheme in {"http", "https"}:
            self._data = fetch(self.url, max_bytes=max_bytes, timeout=timeout, allow_private=allow_private)[0]
        else:
            raise InvalidPayload(
                f"url: files are read from http, https and data URLs, not {scheme or 'a bare path'}",
                detail=[problem(["body", "url"], "URL scheme should be http, https or data", "url_scheme")],
            )
        return self._data

    def save(self, path: str | Path, *, overwrite: bool = False, max_bytes: int = MAX_BYTES) -> Path:
        """Write the bytes to ``path`` (its folders are made) and return it.

        Raises:
            FileExistsError: there is a file and ``overwrite`` is False.
            InvalidPayload: as :meth:`as_bytes`.
        """
        target = Path(path)
        data = self.as_bytes(max_bytes=max_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb" if overwrite else "xb") as file:
            file.write(data)
        return target


class Image(File):
    """An image file.

    Attributes:
        width: in pixels, if known.
        height: in pixels, if known.
    """

    model_config = ConfigDict(json_schema_extra={"description": "An image file by its URL.", "ui": {"field": "image"}})

    width: int | None = Field(default=None, description="Width in pixels.", examples=[1024])
    height: int | None = Field(default=None, description="Height in pixels.", examples=[1024])

    @classmethod
    def from_bytes(  # type: ignore[override]  # an image is saved by its format, as in fal
        cls,
        data: bytes,
        format: str,
        size: Any = None,
        file_name: str | None = None,
        repository: Repository | str | None = None,
        request: Any = None,
    ) -> Self:
        """Save an image file.

        Args:
            data: the encoded image.
            format: ``png``, ``jpeg``, ``webp``, ``gif``, ...
            size: anything with ``width`` and ``height``; default: read from the file, if PIL is installed.
            file_name: default: a random one.
            repository: as in :meth:`File.from_bytes`.
            request: accepted for fal's sake.
        """
        kind = _format_name(format)
        name = file_name or f"{uuid.uuid4().hex}.{kind}"
        image = super().from_bytes(data, f"image/{kind}", name, repository, request)
        image.width, image.height = (size.width, size.height) if size is not None else _size_of(data)
        return image

    @classmethod
    def from_pil(
        cls,
        pil_image: PILImage.Image,
        format: str | None = None,
        file_name: str | None = None,
        repository: Repository | str | None = None,
        request: Any = None,
    ) -> Self:
        """Encode and save a PIL image.

        Args:
            pil_image: any mode; one that the format does not have becomes the nearest that keeps the picture (a JPEG
                with transparent pixels becomes a PNG).
            format: ``png``, ``jpeg`` or ``webp``; default: the format it was read from, else ``png``.
            file_name: default: a random one.
            repository: as in :meth:`File.from_bytes`.
            request: accepted for fal's sake.

        Raises:
            EncodingError: no such format, or no format of ours can keep such pixels.
        """
        wanted = _format_name(format or pil_image.format or "png")
        if format is None and wanted not in {"png", "jpeg", "webp"}:
            wanted = "png"
        encoder = image_format(wanted)
        if encoder is None:
            raise EncodingError("pixels is no file format; use png, jpeg or webp")
        try:
            content_type, data = encode_image(pil_image, encoder, _QUALITY)
        except UnfitError as error:
            raise EncodingError(f"the image cannot be encoded: {error}") from None
        return cls.from_bytes(
            data, content_type.removeprefix("image/"), pil_image, file_name=file_name, repository=repository
        )

    def to_pil(
        self, mode: str = "RGB", *, max_bytes: int = MAX_BYTES, allow_private: bool | None = None
    ) -> PILImage.Image:
        """Return the image, turned upright by its EXIF orientation.

        Args:
            mode: PIL mode to convert to.
            max_bytes: larger files are refused.
            allow_private: as in :meth:`File.as_bytes`.

        Raises:
            InvalidPayload: as :meth:`File.as_bytes`; also when it is no image, or one of absurd size.
        """
        from PIL import Image as PILImage
        from PIL import ImageOps

        data = self.as_bytes(max_bytes=max_bytes, allow_private=allow_private)
        try:
            image: PILImage.Image = PILImage.open(io.BytesIO(data))
            # First the orientation, then the conversion: convert() drops the EXIF data that holds it.
            image = ImageOps.exif_transpose(image) or image
            if isinstance(image.info.get("transparency"), bytes):  # one alpha value per colour of a palette
                image = image.convert("RGBA")
            return image.convert(mode)
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
            raise InvalidPayload(
                f"url: not a readable image: {error}",
                detail=[problem(["body", "url"], "File should be a readable image", "image")],
            ) from None


def _scheme(url: str) -> str:
    # Not urlsplit: it keeps what it has seen in a cache, and data URLs are large.
    return url[:16].partition(":")[0].lower()


def _format_name(name: str) -> str:
    lowered = name.lower().lstrip(".")
    return "jpeg" if lowered == "jpg" else lowered


def _size_of(data: bytes) -> tuple[int | None, int | None]:
    try:
        from PIL import Image as PILImage

        return PILImage.open(io.BytesIO(data)).size
    except (ImportError, OSError, ValueError, SyntaxError):
        return None, None
