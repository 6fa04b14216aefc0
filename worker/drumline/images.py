"""PIL images <-> raw pixels or image files. PIL is imported only where an image is at hand, or has to be built.

Images inside Python stay pixels: nothing is lost and nothing is encoded. For HTTP they are encoded once, in the process
that made them; a mode that the wanted format cannot carry goes to the nearest one that keeps the picture.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import Buffer

from drumline.attachments import Pixels, resolve
from drumline.errors import EncodingError
from drumline.tensors import UnfitError

if TYPE_CHECKING:
    from PIL.Image import Image

#: bits of one pixel in PIL's raw form; rows of mode "1" are padded to whole bytes
_BITS = {
    "1": 1,
    **dict.fromkeys(("L", "P"), 8),
    **dict.fromkeys(("LA", "La", "PA", "I;16", "I;16B", "I;16L", "I;16N"), 16),
    **dict.fromkeys(("RGB", "YCbCr", "HSV", "LAB"), 24),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "I", "F"), 32),
}
#: entries of ``Image.info`` that belong to the picture; others (comments, file details) stay behind
_INFO = ("transparency", "icc_profile", "exif", "dpi", "gamma")
#: name (what callers write) -> PIL's name, content type, largest side of the format in pixels
_FORMATS = {
    "jpeg": ("JPEG", "image/jpeg", 65500),
    "jpg": ("JPEG", "image/jpeg", 65500),
    "png": ("PNG", "image/png", (1 << 31) - 1),
    "webp": ("WEBP", "image/webp", 16383),
}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file that is already encoded; may also be returned by a worker.

    Attributes:
        content_type: ``image/jpeg``, ``image/png``, ``image/webp`` or another image type.
        width: in pixels.
        height: in pixels.
        data: the file's bytes.
    """

    content_type: str
    width: int
    height: int
    data: Buffer

    def to_pil(self) -> Image:
        """Decode the file.

        Raises:
            EncodingError: PIL is not installed or cannot read the file.
        """
        module = _pil("an encoded image")
        try:
            image: Image = module.open(io.BytesIO(memoryview(self.data)))
            image.load()
        except Exception as error:
            raise EncodingError(f"the {self.content_type} cannot be decoded: {error}") from error
        return image


def image_format(name: str) -> tuple[str, str, int] | None:
    """Return what :func:`encode_image` needs for ``name`` in any case; None for ``pixels``.

    Raises:
        EncodingError: no such format.
    """
    lowered = name.lower()
    if lowered == "pixels":
        return None
    if lowered not in _FORMATS:
        raise EncodingError(f"there is no image format {name[:40]!a}; use jpeg, png or webp")
    return _FORMATS[lowered]


def image_pixels(image: Image) -> Pixels:
    """Return the image as raw pixels; ``content`` holds the bytes, of any size.

    Raises:
        UnfitError: a mode that PIL itself cannot rebuild.
    """
    if image.mode not in _BITS:
        raise UnfitError(f"an image of mode {image.mode}; convert it to RGB first")
    image.load()
    palette_mode, palette = "", b""
    if image.mode in ("P", "PA"):
        palette_mode = image.palette.mode if image.palette is not None else "RGB"
        palette = bytes(image.getpalette(palette_mode) or b"")
    info = {name: image.info[name] for name in _INFO if _is_simple(image.info.get(name))}
    content = image.tobytes() if image.width and image.height else b""
    return Pixels(image.mode, image.width, image.height, palette_mode, palette, info, content)


def build_image(header: Pixels, buffers: list[Buffer]) -> Image:
    """Return the image; it has its own memory.

    Raises:
        EncodingError: the header and the bytes do not belong together, or PIL is not installed.
    """
    content = _pixel_bytes(header, buffers)
    if (header.palette_mode not in ("", "RGB", "RGBA", "CMYK")) or len(header.palette) > 1024:
        raise EncodingError("the message holds an image with an impossible palette")
    size = (header.width, header.height)
    module = _pil("an image")
    image: Image = module.frombytes(header.mode, size, content) if len(content) else module.new(header.mode, size)
    if header.palette_mode:
        image.putpalette(header.palette, header.palette_mode)
    image.info.update(header.info)
    return image


def encode_image(image: Image, wanted: tuple[str, str, int], quality: int) -> tuple[str, bytes]:
    """Return content type and bytes of the file.

    Args:
        image: any PIL image.
        wanted: what :func:`image_format` returned.
        quality: 1-100, for JPEG and WebP.

    Raises:
        UnfitError: a picture that no format of ours can keep (float or 32-bit pixels, no pixels at all).
    """
    if not image.width or not image.height:
        raise UnfitError(f"an image of {image.width} x {image.height} pixels; there is nothing to encode")
    image.load()
    image = _common_mode(image)
    kind, content_type, limit = wanted
    if image.mode in _SIXTEEN_BIT or max(image.size) > limit:
        kind = "PNG"
    elif kind == "JPEG" and image.has_transparency_data:
        image = _without_useless_alpha(image)
        kind = "PNG" if image.has_transparency_data else "JPEG"
    options: dict[str, Any] = {}
    if kind == "PNG":
        content_type = "image/png"
    else:
        content_type = {"JPEG": "image/jpeg", "WEBP": "image/webp"}[kind]
        options["quality"] = quality
        image = _plain_mode(image, kind)
        if image.mode in ("RGB", "RGBA") and isinstance(image.info.get("icc_profile"), bytes):
            options["icc_profile"] = image.info["icc_profile"]
    return content_type, _saved(image, kind, options)


def _saved(image: Image, kind: str, options: dict[str, Any]) -> bytes:
    """The file's bytes.

    PIL encodes a JPEG without the interpreter's lock only into a real file; into a ``BytesIO`` it keeps all other threads from
    running meanwhile, such as the one that computes the next step.
    """
    try:
        file: Any = os.fdopen(os.memfd_create("drumline-image"), "w+b")
    except (AttributeError, OSError):  # not Linux, or no descriptor left
        file = io.BytesIO()
    with file:
        image.save(file, kind, **options)
        file.seek(0)
        data: bytes = file.read()
        return data


def pixels_to_png(header: Pixels, buffers: list[Buffer]) -> bytes:
    """Return a PNG file of raw pixels, made without PIL.

    Raises:
        EncodingError: a mode that PNG does not have, or a damaged message.
    """
    kinds = {"1": (1, 0), "L": (8, 0), "I;16": (16, 0), "RGB": (8, 2), "P": (8, 3), "LA": (8, 4), "RGBA": (8, 6)}
    if header.mode not in kinds or not header.width or not header.height:
        raise EncodingError(f"an image of mode {header.mode} has no PNG form; return .convert('RGB')")
    depth, color = kinds[header.mode]
    content = bytearray(_pixel_bytes(header, buffers))
    if depth == 16:  # PNG is big-endian
        content[0::2], content[1::2] = content[1::2], content[0::2]
    row = len(content) // header.height
    rows = b"".join(b"\0" + content[start : start + row] for start in range(0, len(content), row))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", header.width, header.height, depth, color, 0, 0, 0))]
    if header.mode == "P":
        step = len(header.palette_mode) or 3
        colors = [header.palette[i : i + step] for i in range(0, min(len(header.palette), 256 * step), step)]
        chunks.append((b"PLTE", b"".join(entry[:3] for entry in colors)))
        transparency = header.info.get("transparency")
        if step == 4:
            chunks.append((b"tRNS", b"".join(entry[3:] for entry in colors)))
        elif isinstance(transparency, bytes):
            chunks.append((b"tRNS", transparency[: len(colors)]))
        elif isinstance(transparency, int) and 0 <= transparency < len(colors):
            chunks.append((b"tRNS", b"\xff" * transparency + b"\0"))
    chunks += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    file = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        file += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    return b"".join(file)


def _pixel_bytes(header: Pixels, buffers: list[Buffer]) -> memoryview:
    if header.mode not in _BITS or min(header.width, header.height) < 0:
        raise EncodingError(f"the message holds an image of mode {header.mode[:20]!a} and an impossible size")
    content = memoryview(resolve(header.content, buffers))
    expected = (header.width * _BITS[header.mode] + 7) // 8 * header.height
    if content.nbytes != expected:
        raise EncodingError(f"the message holds {content.nbytes} bytes for an image of {expected} bytes")
    return content


def _pil(what: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise EncodingError(f"the value holds {what}, but PIL cannot be imported here: {error}") from None
    return Image


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(item) in (int, float) for item in value)
    return type(value) in (int, float, bytes)


def _common_mode(image: Image) -> Image:
    """Leave one of 1, L, LA, P, RGB, RGBA, I;16 and I;16B: what web formats know."""
    mode = image.mode
    if mode in _PNG_MODES:
        return image
    if mode in ("I;16L", "I;16N"):
        return image.convert("I").convert("I;16")
    if mode in ("RGBa", "PA"):
        return image.convert("RGBA")
    if mode == "La":
        return image.convert("LA")
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        if converted is None:
            raise UnfitError("an image of mode LAB that PIL cannot convert; return it as RGB")
        return converted
    if mode == "I":
        low, high = image.getextrema()
        if isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and high <= 0xFFFF:
            return image.convert("I;16")
        raise UnfitError(f"an image of mode I with values {low} to {high}; scale it to 0..65535, or return an array")
    if mode == "F":
        raise UnfitError("an image of mode F (float pixels); return .convert('L') or 'RGB', or return an array")
    image = image.convert("RGB")  # CMYK, YCbCr, HSV, RGBX; a profile of the old colours no longer fits
    image.info.pop("icc_profile", None)
    return image


def _without_useless_alpha(image: Image) -> Image:
    """Drop an alpha channel that hides nothing."""
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        return image.convert(image.mode[:-1])
    return image


def _plain_mode(image: Image, kind: str) -> Image:
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode == "P" or (image.mode == "L" and kind == "WEBP"):
        image = image.convert("RGB")
    return image
