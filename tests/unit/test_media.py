"""Files out of results."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from drumline.client import save_images
from drumline.errors import ConnectionFailed, EncodingError


def uri(data, media="image/png"):
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def test_one_image_has_the_bare_name(tmp_path):
    image = {"url": uri(b"png"), "content_type": "image/png", "width": 1}
    result, files = save_images({"image": image, "seed": 7}, tmp_path / "out", "light")
    assert files == (tmp_path / "out" / "light.png",)
    assert files[0].read_bytes() == b"png"
    assert result == {"image": {**image, "url": str(files[0])}, "seed": 7}
    assert image["url"].startswith("data:")


def test_several_files_are_numbered_in_order(tmp_path):
    images = [
        {"url": uri(bytes([n]), media)} for n, media in enumerate(["image/jpeg", "image/webp", "application/x-npy"])
    ]
    result, files = save_images({"images": images[:2], "more": {"mask": images[2]}}, tmp_path, "x")
    assert [path.name for path in files] == ["x-0.jpg", "x-1.webp", "x-2.npy"]
    assert [path.read_bytes() for path in files] == [b"\0", b"\1", b"\2"]
    assert result["more"]["mask"]["url"] == str(files[2])


def test_a_result_without_files_makes_no_folder(tmp_path):
    saved = save_images(
        {"text": "data:", "url": "not a link", "page": {"url": "https://example.org/"}}, tmp_path / "no"
    )
    assert saved.files == ()
    assert saved.result == {"text": "data:", "url": "not a link", "page": {"url": "https://example.org/"}}
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("value", [None, 3, "text", [1, [2]], []])
def test_results_of_any_shape(value, tmp_path):
    assert save_images(value, tmp_path).result == value


def test_a_data_uri_without_base64(tmp_path):
    _, (file,) = save_images({"url": "data:text/plain,a%20b"}, tmp_path)
    assert file.read_bytes() == b"a b"
    assert file.suffix == ".txt"


@pytest.mark.parametrize("url", ["data:image/png;base64,***", "data:image/png;base64,AAA", "data:image/png"])
def test_a_broken_data_uri_is_named(url, tmp_path):
    with pytest.raises(EncodingError, match=r"result\.images\[1\]\.url"):
        save_images({"images": [{"url": uri(b"ok")}, {"url": url}]}, tmp_path)


def test_an_unknown_type_cannot_choose_its_name(tmp_path):
    _, (file,) = save_images({"url": uri(b"x", "a/../../b")}, tmp_path)
    assert file == tmp_path / "image.bin"


def test_no_half_file_stays(tmp_path):
    (tmp_path / "image.png").mkdir()
    with pytest.raises(OSError, match="image"):
        save_images({"url": uri(b"x")}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.fixture
def file_server():
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(200 if self.path.startswith("/ok") else 404)
            self.end_headers()
            self.wfile.write(b"file")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_of_files_are_fetched(file_server, tmp_path):
    url, seen = file_server
    _, (file,) = save_images({"image": {"url": f"{url}/ok.webp?x=1", "content_type": "image/x-odd"}}, tmp_path)
    assert file == tmp_path / "image.webp"
    assert file.read_bytes() == b"file"
    assert "Authorization" not in seen[0]


def test_a_file_that_is_not_there_is_named(file_server, tmp_path):
    url, _ = file_server
    with pytest.raises(ConnectionFailed, match=r"result.image.url: .* answered 404"):
        save_images({"image": {"url": f"{url}/no.png", "content_type": "image/png"}}, tmp_path)
