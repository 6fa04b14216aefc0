"""``File`` and ``Image``: their JSON, their bytes, and where the bytes go."""

import base64
import io
import json
from pathlib import Path

import jsonschema_rs
import pytest
from PIL import Image as PILImage
from pydantic import BaseModel, ValidationError

from drumline.errors import ConfigurationError, EncodingError, InvalidPayload
from drumline.toolkit import DataRepository, DirectoryRepository, File, Image
from drumline.toolkit.fetch import decode_data_uri, is_public
from drumline.toolkit.repositories import repository_for


class Body(BaseModel):
    file: File
    image: Image | None = None


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv("DRUMLINE_FILES", raising=False)
    monkeypatch.delenv("DRUMLINE_ALLOW_PRIVATE_URLS", raising=False)


def picture(mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> PILImage.Image:
    image = PILImage.new("RGBA", size, (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 255, 0))
    return image.convert(mode)


# --- JSON


def test_the_json_of_an_image():
    made = json.loads(Image.from_pil(picture()).model_dump_json())
    assert set(made) == {"url", "content_type", "file_name", "file_size", "width", "height"}
    assert made["url"].startswith("data:image/png;base64,")
    data = base64.b64decode(made["url"].partition(",")[2])
    assert (made["content_type"], made["width"], made["height"]) == ("image/png", 6, 4)
    assert made["file_size"] == len(data)
    assert made["file_name"].endswith(".png")
    assert PILImage.open(io.BytesIO(data)).size == (6, 4)


def test_a_plain_url_is_a_file():
    body = Body.model_validate({"file": "https://example.com/a.png", "image": "data:image/png;base64,AAAA"})
    assert body.file == File(url="https://example.com/a.png")
    assert isinstance(body.image, Image)
    full = Body.model_validate({"file": {"url": "https://example.com/a.png", "file_name": "b.png", "file_size": 3}})
    assert (full.file.file_name, full.file.file_size, full.file.content_type) == ("b.png", 3, None)


@pytest.mark.parametrize("value", ["", "cat.png", "file:///etc/passwd", "ftp://example.com/a", 3, None, [], {}])
def test_what_is_no_file(value):
    with pytest.raises(ValidationError):
        Body.model_validate({"file": value})


def test_the_bytes_are_not_shown():
    file = File.from_bytes(b"secret bytes")
    assert file.as_bytes() == b"secret bytes"
    assert set(file.model_dump()) == {"url", "content_type", "file_name", "file_size"}
    assert "secret bytes" not in repr(file)


@pytest.mark.parametrize(("model", "kind"), [(File, "file"), (Image, "image")])
def test_the_schema_says_what_it_is(model, kind):
    response = model.model_json_schema(mode="serialization")
    assert response["ui"] == {"field": kind}
    assert response["required"] == ["url"]
    assert all("description" in field for field in response["properties"].values())
    request = model.model_json_schema()
    assert request["ui"] == {"field": kind}
    shape, url = request["anyOf"]
    assert (shape["type"], shape["properties"]["url"]["type"], url["type"]) == ("object", "string", "string")


def test_schema_and_validation_agree_about_urls():
    check = jsonschema_rs.validator_for(Body.model_json_schema())
    for value in ("https://example.com/a.png", {"url": "https://example.com/a.png", "file_name": None}):
        assert check.is_valid({"file": value, "image": value})
        Body.model_validate({"file": value, "image": value})
    for wrong in (3, {}, None, ["https://example.com/a.png"]):
        assert not check.is_valid({"file": wrong})


# --- bytes in and out


@pytest.mark.parametrize(
    ("name", "content_type", "expected"),
    [
        ("a.txt", None, "text/plain"),
        ("a.mp4", None, "video/mp4"),
        (None, "audio/wav", "audio/wav"),
        (None, None, "application/octet-stream"),
        ("a.png", "x/y", "x/y"),
    ],
)
def test_from_bytes(name, content_type, expected):
    file = File.from_bytes(b"\0\1", content_type, name)
    assert (file.content_type, file.file_size) == (expected, 2)
    assert file.file_name == name if name else file.file_name
    again = File.model_validate_json(file.model_dump_json())
    assert again.as_bytes() == b"\0\1"


def test_from_path_and_save(tmp_path):
    source = tmp_path / "cat.txt"
    source.write_bytes(b"meow")
    file = File.from_path(source)
    assert (file.file_name, file.content_type) == ("cat.txt", "text/plain")
    target = file.save(tmp_path / "new" / "copy.txt")
    assert target.read_bytes() == b"meow"
    with pytest.raises(FileExistsError):
        file.save(target)
    assert file.save(str(target), overwrite=True) == target
    with pytest.raises(FileNotFoundError):
        File.from_path(tmp_path / "missing")


def test_local_files_of_strangers_are_not_read(tmp_path):
    (tmp_path / "secret").write_text("x")
    for url in ((tmp_path / "secret").as_uri(), str(tmp_path / "secret"), "gopher://x"):
        with pytest.raises(InvalidPayload, match="url: files are read from http, https and data URLs") as caught:
            File.model_validate({"url": url}).as_bytes()
        assert caught.value.detail[0]["loc"] == ["body", "url"]


@pytest.mark.parametrize(
    ("uri", "data", "media_type"),
    [
        ("data:,a%20b", b"a b", "text/plain"),
        ("data:text/html;charset=utf-8,%3Cb%3E", b"<b>", "text/html"),
        ("data:;base64,AQI=", b"\1\2", "text/plain"),
        ("data:image/png;base64,", b"", "image/png"),
        ("data:a/b;x=y;base64,AQI%3D", b"\1\2", "a/b"),
    ],
)
def test_data_uris(uri, data, media_type):
    assert decode_data_uri(uri) == (data, media_type)


@pytest.mark.parametrize("uri", ["data:", "data:image/png;base64", "data:;base64,A", "data:;base64,A*==", "x:,y"])
def test_malformed_data_uris(uri):
    with pytest.raises(InvalidPayload):
        decode_data_uri(uri)


@pytest.mark.parametrize("size", [9, 10, 11, 12, 1000])
@pytest.mark.parametrize("head", ["data:;base64,", "data:,"])
def test_the_size_limit_of_data_uris(head, size):
    body = base64.b64encode(b"x" * size).decode() if "base64" in head else "%78" * size
    if size <= 10:
        assert len(decode_data_uri(head + body, max_bytes=10)[0]) == size
    else:
        with pytest.raises(InvalidPayload, match="larger than 10 bytes"):
            decode_data_uri(head + body, max_bytes=10)


# --- images


@pytest.mark.parametrize("format", ["png", "jpeg", "jpg", "JPEG", "webp"])
def test_formats(format):
    image = Image.from_pil(picture(), format=format)
    kind = {"jpg": "jpeg"}.get(format.lower(), format.lower())
    assert image.content_type == f"image/{kind}"
    assert PILImage.open(io.BytesIO(image.as_bytes())).format == kind.upper()


def test_the_images_own_format_is_kept():
    file = io.BytesIO()
    picture().save(file, "JPEG")
    assert Image.from_pil(PILImage.open(file)).content_type == "image/jpeg"
    file = io.BytesIO()
    picture("L").save(file, "BMP")
    assert Image.from_pil(PILImage.open(file)).content_type == "image/png"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_a_readable_image(mode):
    image = picture("I").convert("I;16") if mode == "I;16" else picture(mode)
    for format in (None, "jpeg", "webp"):
        made = Image.from_pil(image, format=format)
        assert made.to_pil().size == (6, 4)
        assert made.to_pil().mode == "RGB"


def test_what_cannot_be_encoded():
    with pytest.raises(EncodingError, match="use jpeg, png or webp"):
        Image.from_pil(picture(), format="tga")
    with pytest.raises(EncodingError):
        Image.from_pil(picture(), format="pixels")
    with pytest.raises(EncodingError, match="mode F"):
        Image.from_pil(picture("F"))


def test_from_bytes_reads_the_size():
    file = io.BytesIO()
    picture().save(file, "WEBP")
    image = Image.from_bytes(file.getvalue(), "webp", file_name="x.webp")
    assert (image.width, image.height, image.content_type, image.file_name) == (6, 4, "image/webp", "x.webp")
    unknown = Image.from_bytes(b"no image at all", "png")
    assert (unknown.width, unknown.height) == (None, None)


def test_a_photo_is_turned_upright():
    file = io.BytesIO()
    photo = picture("RGB", (6, 4))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif)
    assert Image.from_bytes(file.getvalue(), "jpeg").to_pil().size == (4, 6)
    assert Image.from_bytes(file.getvalue(), "jpeg").to_pil(mode="L").mode == "L"


def test_what_is_no_image():
    for data in (b"", b"text", base64.b64decode("iVBORw0KGgoAAAANSUhEUg==")):
        with pytest.raises(InvalidPayload, match="not a readable image"):
            Image.from_bytes(data, "png").to_pil()


# --- repositories


def test_a_directory(tmp_path):
    file = File.from_bytes(b"abc", file_name="../../evil.PNG", repository=DirectoryRepository(tmp_path / "files"))
    (stored,) = (tmp_path / "files").iterdir()
    assert stored.read_bytes() == b"abc"
    assert stored.suffix == ".PNG"
    assert file.url == stored.as_uri()
    assert file.as_bytes() == b"abc"
    named = File.from_bytes(b"abc", file_name="a.b/c", repository=DirectoryRepository(tmp_path, "https://x.test/f/"))
    assert Path(tmp_path, named.url.removeprefix("https://x.test/f/")).read_bytes() == b"abc"


def test_the_configured_default(tmp_path, monkeypatch):
    assert File.from_bytes(b"a").url.startswith("data:")
    monkeypatch.setenv("DRUMLINE_FILES", f"dir:{tmp_path}?url=https://x.test/f")
    for repository in (None, "fal", "fal_v3", "cdn"):
        assert File.from_bytes(b"a", file_name="a.txt", repository=repository).url.startswith("https://x.test/f/")
    assert File.from_bytes(b"a", repository="in_memory").url.startswith("data:")
    assert File.from_bytes(b"a", repository=DataRepository()).url.startswith("data:")
    assert File.from_bytes(b"a", repository=f"dir:{tmp_path}").url.startswith("file:///")
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "specification",
    ["gcs://x", "dir:", "dir:/x?uri=y", "s3:bucket", "s3://b?expires=soon", "data:?x=1", "/just/a/path", "nonsense"],
)
def test_wrong_specifications(specification):
    with pytest.raises(ConfigurationError, match="file repository"):
        repository_for(specification)


# --- which addresses are public


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "not an ip",
    ],
)  # fmt: skip
def test_private_addresses(address):
    assert not is_public(address)
