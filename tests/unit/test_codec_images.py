"""Images: every PIL mode pixel by pixel between processes, and the picture kept in files for HTTP."""

from __future__ import annotations

import io
import itertools
import os
import random
import sys
import threading
from typing import Any

import msgspec
import pytest
from PIL import Image, ImageChops, ImageCms

from drumline import attachments
from drumline.attachments import Pixels
from drumline.codec import EncodedImage, pack, snapshot, to_json, unpack
from drumline.errors import EncodingError
from drumline.images import encode_image, image_format

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
MODES += ["I;16", "I;16B", "I;16L", "I;16N"]


def carried(value: Any, **options: Any) -> Any:
    return unpack(*pack(value, **options))


def picture(mode: str, size: tuple[int, int] = (13, 7)) -> Image.Image:
    blank = Image.new(mode, size)
    if mode == "F":
        image = Image.new("F", size)
        image.putdata([i / 7 - 3 for i in range(size[0] * size[1])])
        return image
    image = Image.frombytes(mode, size, random.Random(5).randbytes(len(blank.tobytes())))
    if mode in ("P", "PA"):
        image.putpalette(random.Random(6).randbytes(768))
    return image


@pytest.mark.parametrize("limit", [0, 65536])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_pixel_by_pixel(mode: str, limit: int) -> None:
    image = picture(mode)
    for source in (image, snapshot([image])[0]):
        back = carried({"image": source}, inline_limit=limit)["image"]
        assert back == image
        assert back.mode == mode
        if mode in ("P", "PA"):
            assert back.convert("RGBA") == image.convert("RGBA")


def through_png(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()))


def palettes() -> dict[str, Image.Image]:
    short = Image.new("P", (4, 4), 2)
    short.putpalette([1, 2, 3, 4, 5, 6, 7, 8, 9])
    one = picture("P")
    one.info["transparency"] = 3
    many = picture("P")
    many.info["transparency"] = bytes(range(256))
    rgba = Image.new("P", (4, 4), 1)
    rgba.putpalette(list(range(40)), "RGBA")
    grey = Image.new("L", (4, 4), 9)
    grey.info["transparency"] = 9
    colour = Image.new("RGB", (4, 4), (1, 2, 3))
    colour.info["transparency"] = (1, 2, 3)
    return {
        "short": short,
        "one transparent": one,
        "many transparent": many,
        "rgba palette": rgba,
        "from a file": through_png(many),
        "one from a file": through_png(one),
        "transparent grey": grey,
        "transparent colour": colour,
    }


@pytest.mark.parametrize("name", palettes())
def test_palettes_and_transparency(name: str) -> None:
    image = palettes()[name]
    back = carried([image])[0]
    assert back == image.copy()  # a copy: equality asks for the same class
    assert back.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    for wanted in ("jpeg", "png", "webp"):
        file = carried([image], images=wanted)[0]
        opaque = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}[wanted]
        assert file.content_type == ("image/png" if wanted == "jpeg" and name != "short" else opaque)
        shown = file.to_pil().convert("RGBA")
        expected = image.convert("RGBA")
        assert shown.getchannel("A").tobytes() == expected.getchannel("A").tobytes()
        if file.content_type == "image/png":
            assert shown.tobytes() == expected.tobytes()


def test_the_details_that_belong_to_the_picture_stay() -> None:
    image = Image.new("RGB", (2, 2))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info.update(icc_profile=profile, dpi=(72.0, 72), comment="private", exif=b"Exif", gamma=0.5, weird=object())
    back = carried(image)
    assert back.info == {"icc_profile": profile, "dpi": (72.0, 72), "exif": b"Exif", "gamma": 0.5}
    for wanted in ("jpeg", "png", "webp"):
        assert carried(image, images=wanted).to_pil().info["icc_profile"] == profile


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_tiny_images(size: tuple[int, int]) -> None:
    for mode in MODES:
        image = Image.new(mode, size)
        assert carried(image) == image
    if 0 in size:
        with pytest.raises(EncodingError, match=rf"^result\[0\]: an image of {size[0]} x {size[1]} pixels cannot"):
            pack([Image.new("RGB", size)], images="png")


def test_image_subclasses_and_lazy_files() -> None:
    image = picture("RGB")
    lazy = through_png(image)
    assert type(lazy) is not Image.Image
    back = carried(lazy)
    assert back == Image.frombytes("RGB", image.size, image.tobytes())


def test_a_truncated_file_is_an_encoding_error() -> None:
    file = io.BytesIO()
    picture("RGB", (64, 64)).save(file, "PNG")
    for images in ("pixels", "png"):
        for carry in (lambda value, i=images: pack(value, images=i), lambda value: snapshot(value, path="result")):
            broken = Image.open(io.BytesIO(file.getvalue()[:-2000]))
            with pytest.raises(EncodingError, match=r"^result\.a: a value of type PIL\..* could not be read"):
                carry({"a": broken})


# --- files

#: mode -> content type when JPEG was asked for
AS_JPEG = {
    "1": "image/jpeg",
    "L": "image/jpeg",
    "LA": "image/png",
    "La": "image/png",
    "P": "image/jpeg",
    "PA": "image/png",
    "RGB": "image/jpeg",
    "RGBA": "image/png",
    "RGBa": "image/png",
    "RGBX": "image/jpeg",
    "CMYK": "image/jpeg",
    "YCbCr": "image/jpeg",
    "HSV": "image/jpeg",
    "LAB": "image/jpeg",
    "I;16": "image/png",
    "I;16B": "image/png",
    "I;16L": "image/png",
    "I;16N": "image/png",
}


def smooth(mode: str) -> Image.Image:
    """A gradient: what JPEG is made for."""
    base = Image.linear_gradient("L").resize((32, 32))
    if mode.startswith("I;16"):
        image = Image.new("I;16", base.size)
        image.putdata(
            [value * 200 for value in base.getdata()]
            if not hasattr(base, "get_flattened_data")
            else [value * 200 for value in base.get_flattened_data()]
        )
        content = image.tobytes()
        if mode == "I;16B":
            content = bytes(itertools.chain.from_iterable(zip(content[1::2], content[::2], strict=True)))
        return Image.frombytes(mode, image.size, content)
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        converted = ImageCms.profileToProfile(base.convert("RGB"), *profiles, outputMode="LAB")
        assert converted is not None
        return converted
    if mode in ("La", "RGBa", "PA", "LA", "RGBA"):
        straight = Image.merge("LA", (base, base.transpose(Image.Transpose.ROTATE_90)))
        if mode == "La":
            return straight.convert("La")
        if mode == "PA":
            image = Image.frombytes("PA", straight.size, straight.tobytes())
            image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
            return image
        return straight if mode == "LA" else straight.convert("RGBA").convert(mode)
    if mode in ("HSV", "YCbCr", "CMYK", "RGBX"):
        return base.convert("RGB").convert(mode)
    if mode == "P":
        image = base.copy()
        image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
        return image
    return base.convert(mode)


def as_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted.convert("RGBA")
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


@pytest.mark.parametrize("mode", AS_JPEG)
@pytest.mark.parametrize("wanted", ["jpeg", "JPG", "png", "WebP"])
def test_files_keep_the_picture(mode: str, wanted: str) -> None:
    image = smooth(mode)
    file = carried({"image": image}, images=wanted)["image"]
    assert isinstance(file, EncodedImage)
    if wanted in ("jpeg", "JPG"):
        assert file.content_type == AS_JPEG[mode]
    elif wanted == "png" or mode.startswith("I;16"):
        assert file.content_type == "image/png"
    else:
        assert file.content_type == "image/webp"
    assert (file.width, file.height) == image.size
    shown = file.to_pil()
    assert shown.size == image.size
    if mode.startswith("I;16"):
        native = image if mode == "I;16" else image.convert("I").convert("I;16")
        assert shown.convert("I").tobytes() == native.convert("I").tobytes()
        return
    difference = ImageChops.difference(shown.convert("RGBA"), as_rgba(image))
    alpha = as_rgba(image).getchannel("A").point(lambda value: 255 if value > 40 else 0)  # colours behind it are free
    visible = Image.composite(difference.convert("RGB"), Image.new("RGB", image.size), alpha)
    allowed = 3 if file.content_type == "image/png" else 40 if mode == "1" else 14
    assert max(high for _, high in visible.getextrema()) <= allowed  # type: ignore[misc]
    assert difference.getchannel("A").getextrema()[1] <= 1  # type: ignore[operator]


def test_the_image_itself_is_left_alone() -> None:
    image = smooth("RGBA")
    before = (image.mode, image.tobytes(), dict(image.info))
    for wanted in ("pixels", "jpeg", "png", "webp"):
        pack(image, images=wanted)
    assert (image.mode, image.tobytes(), dict(image.info)) == before


def test_opaque_alpha_does_not_need_png() -> None:
    for mode in ("RGBA", "LA"):
        image = smooth("L").convert("RGB").convert("RGBA").convert(mode)
        assert carried(image, images="jpeg").content_type == "image/jpeg"


def test_whole_numbers_of_sixteen_bits_become_png_and_others_are_refused() -> None:
    image = Image.new("I", (2, 1))
    image.putpixel((0, 0), 65535)
    for wanted in ("jpeg", "png", "webp"):
        shown = carried(image, images=wanted).to_pil()
        assert [shown.getpixel((0, 0)), shown.getpixel((1, 0))] == [65535, 0]
    for value in (-1, 65536):
        image.putpixel((1, 0), value)
        with pytest.raises(
            EncodingError, match=r"^result\.x: an image of mode I with values .* cannot be carried; scale"
        ):
            pack({"x": image}, images="jpeg")
    with pytest.raises(EncodingError, match=r"^result\.x: an image of mode F .* cannot be carried; return"):
        pack({"x": Image.new("F", (2, 2))}, images="png")


def test_sizes_beyond_a_format_fall_back_to_png() -> None:
    assert carried(Image.new("L", (16384, 1)), images="webp").content_type == "image/png"
    assert carried(Image.new("L", (16383, 1)), images="webp").content_type == "image/webp"
    assert carried(Image.new("L", (1, 65501)), images="jpeg").content_type == "image/png"
    assert carried(Image.new("L", (1, 65500)), images="jpeg").content_type == "image/jpeg"


def test_quality_is_used() -> None:
    image = picture("RGB", (64, 64))
    sizes = [len(carried(image, images="jpeg", quality=quality).data) for quality in (20, 60, 95)]
    assert sizes == sorted(set(sizes))
    assert carried(image, images="jpeg") == carried(image, images="jpeg", quality=95)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(EncodingError, match="there is no image format 'gif'; use jpeg, png or webp"):
        pack([picture("L")], images="gif")


def test_encoded_images_are_values_too() -> None:
    file = carried(picture("RGB"), images="jpeg")
    assert carried({"image": file}) == {"image": file}
    assert carried(snapshot({"image": file})) == {"image": file}
    with pytest.raises(EncodingError, match="image/jpeg cannot be decoded"):
        EncodedImage("image/jpeg", 1, 1, file.data[:50]).to_pil()
    with pytest.raises(EncodingError, match="image/jpeg cannot be decoded"):
        EncodedImage("image/jpeg", 1, 1, b"not a picture").to_pil()


# --- pixels that reach HTTP after all


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_without_pil(mode: str) -> None:
    image = picture(mode)
    content = msgspec.json.decode(to_json(*pack([image])))[0]
    assert (content["content_type"], content["width"], content["height"]) == ("image/png", 13, 7)
    shown = Image.open(io.BytesIO(msgspec.json.decode(f'"{content["url"].partition(",")[2]}"', type=bytes)))
    shown.load()
    assert shown.mode == mode
    assert shown.tobytes() == image.tobytes()
    if mode == "P":
        assert shown.convert("RGB") == image.convert("RGB")


@pytest.mark.parametrize("name", ["one transparent", "many transparent", "rgba palette", "short"])
def test_png_palettes_without_pil(name: str) -> None:
    image = palettes()[name]
    content = msgspec.json.decode(to_json(*pack([image])))[0]
    shown = Image.open(io.BytesIO(msgspec.json.decode(f'"{content["url"].partition(",")[2]}"', type=bytes)))
    assert shown.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "F", "HSV", "I", "LAB", "PA"])
def test_other_pixels_are_refused_by_json(mode: str) -> None:
    with pytest.raises(EncodingError, match=rf"^result\.a\[1\]: an image of mode {mode} has no PNG form; return"):
        to_json(*pack({"a": [1, picture(mode)]}))


@pytest.mark.parametrize(
    "header",
    [
        Pixels("RGB", 2, 2, "", b"", {}, b"short"),
        Pixels("RGB", -2, -2, "", b"", {}, b"123456789012"),
        Pixels("RGB", 1 << 40, 1 << 40, "", b"", {}, b""),
        Pixels("RGB", 0, 1 << 40, "", b"", {}, b""),
        Pixels("nope", 1, 1, "", b"", {}, b"123"),
        Pixels("P", 1, 1, "nope", b"123", {}, b"1"),
        Pixels("P", 1, 1, "RGB", b"1" * 10_000, {}, b"1"),
        Pixels("RGB", 1, 1, "RGB", b"123", {}, b"123"),
        Pixels("RGB", 1, 1, "", b"", {}, 3),
    ],
)
def test_forged_headers(header: Pixels) -> None:
    data = attachments.encode([msgspec.msgpack.Ext(attachments.PIXELS, attachments.encode(header))])
    with pytest.raises(EncodingError):
        unpack(data)
    try:
        to_json(data)
    except EncodingError:
        pass
    else:
        assert header.palette_mode  # a palette in the wrong place may just be ignored


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_without_a_descriptor_a_file_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wanted = image_format(name)
    assert wanted is not None

    def none_left(name: str) -> int:
        raise OSError(f"no descriptor for {name}")

    first = encode_image(picture("RGB"), wanted, 80)
    monkeypatch.setattr(os, "memfd_create", none_left, raising=False)
    assert encode_image(picture("RGB"), wanted, 80) == first


@pytest.mark.linux
def test_another_thread_runs_while_a_jpeg_is_encoded() -> None:
    """The thread that computes the next step must not wait for a preview of the last."""
    large = Image.effect_noise((6000, 6000), 50).convert("RGB")
    ready, go, story = threading.Event(), threading.Event(), list[str]()

    def other() -> None:
        ready.set()
        go.wait()
        story.append("another thread")

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is made to give up the interpreter's lock
    try:
        thread.start()
        ready.wait()
        go.set()
        encode_image(large, ("JPEG", "image/jpeg", 65500), 80)
        story.append("encoded")
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert story == ["another thread", "encoded"]
