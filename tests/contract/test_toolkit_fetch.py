"""Downloads for ``File``: real servers on loopback, and the guard that keeps strangers away from such servers."""

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import trustme
from PIL import Image as PILImage

from drumline.errors import InvalidPayload
from drumline.toolkit import File, Image
from drumline.toolkit.fetch import fetch

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serve(answers: dict[str, Answer], authority: trustme.CA | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve ``answers`` by path; yields the base URL and a list of the request lines with their Host headers."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers['Host']}")
            answers[urlsplit(self.path).path](self)

        def log_message(self, *_: object) -> None:
            """Silence."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Clients of these tests hang up early on purpose."""

    with Server(("127.0.0.1", 0), Handler) as server:
        scheme = "http"
        if authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("localhost").configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            scheme = "https"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"{scheme}://localhost:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def send(body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, length: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        if length is None or length >= 0:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_a_file_is_downloaded():
    with serve({"/a%20b": send(b"abc", headers={"Content-Type": "Image/PNG; x=y"})}) as (base, seen):
        assert fetch(f"{base}/a b?q=1", allow_private=True) == (b"abc", "image/png")
        file = File(url=f"{base}/a%20b")
        assert file.as_bytes(allow_private=True) == b"abc"
        assert file.as_bytes() == b"abc"  # kept
    port = urlsplit(base).port
    assert seen == [f"/a%20b?q=1 localhost:{port}", f"/a%20b localhost:{port}"]


def test_an_image_is_downloaded(monkeypatch):
    png = io.BytesIO()
    PILImage.new("L", (3, 2)).save(png, "PNG")
    monkeypatch.setenv("DRUMLINE_ALLOW_PRIVATE_URLS", "true")
    with serve({"/x": send(png.getvalue())}) as (base, _):
        assert Image.model_validate(f"{base}/x").to_pil().size == (3, 2)


def test_redirects_are_followed():
    answers = {
        "/1": send(b"", 302, {"Location": "2?x"}),
        "/2": send(b"", 308, {"Location": "/3"}),
        "/3": send(b"end"),
        "/loop": send(b"", 301, {"Location": "/loop"}),
        "/file": send(b"", 301, {"Location": "file:///etc/passwd"}),
    }
    with serve(answers) as (base, seen):
        assert fetch(f"{base}/1", allow_private=True)[0] == b"end"
        with pytest.raises(InvalidPayload, match="more than 5 redirects"):
            fetch(f"{base}/loop", allow_private=True)
        with pytest.raises(InvalidPayload, match="not an http or https URL"):
            fetch(f"{base}/file", allow_private=True)
    assert len(seen) == 3 + 6 + 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "2130706433",
        "0x7f000001", "127.1", "[64:ff9b::7f00:1]",
    ],
)  # fmt: skip
def test_private_addresses_are_refused_before_connecting(host):
    with serve({"/": send(b"inside")}) as (base, seen):
        with pytest.raises(InvalidPayload) as caught:
            fetch(f"http://{host}:{urlsplit(base).port}/", timeout=2)
        assert "is not a public address" in str(caught.value) or "cannot be read" in str(caught.value)
        assert caught.value.detail[0]["loc"] == ["body", "url"]
    assert seen == []


def test_every_address_of_a_name_must_be_public(monkeypatch):
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    with pytest.raises(InvalidPayload, match=r"rebind\.test is not a public address"):
        fetch("http://rebind.test/", timeout=2)


def test_a_name_is_resolved_once(monkeypatch):
    # The answer that was checked is the one that is connected to, whatever a second look-up would say.
    real, asked = socket.getaddrinfo, []

    def resolve(host, *args, **kwargs):
        asked.append(host)
        return real("127.0.0.1" if host == "name.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with serve({"/": send(b"x")}) as (base, seen):
        port = urlsplit(base).port
        assert fetch(f"http://name.test:{port}/", allow_private=True)[0] == b"x"
    assert asked.count("name.test") == 1
    assert seen == [f"/ name.test:{port}"]


@pytest.mark.parametrize(
    "url", ["http://", "ftp://example.com/", "http://user:pw@example.com/", "http://x:99999/", "x"]
)
def test_urls_that_are_refused(url):
    with pytest.raises(InvalidPayload):
        fetch(url, allow_private=True, timeout=2)


def test_answers_that_are_refused():
    answers = {
        "/404": send(b"no", 404),
        "/gzip": send(b"x", headers={"Content-Encoding": "gzip"}),
        "/short": send(b"abc", length=10),
    }
    with serve(answers) as (base, _):
        for path, words in (("/404", "answered 404"), ("/gzip", "compressed"), ("/short", "cannot be read")):
            with pytest.raises(InvalidPayload, match=words):
                fetch(base + path, allow_private=True, timeout=10)


def test_the_size_limit():
    sent = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            sent.set()

    with serve({"/told": send(b"x", length=11), "/endless": endless, "/fits": send(b"x" * 10)}) as (base, _):
        assert len(fetch(f"{base}/fits", max_bytes=10, allow_private=True)[0]) == 10
        for path in ("/told", "/endless"):
            with pytest.raises(InvalidPayload, match="larger than 10 bytes"):
                fetch(base + path, max_bytes=10, allow_private=True, timeout=10)
        assert sent.wait(10)  # the connection was closed


@pytest.mark.parametrize("where", ["connect", "head", "body", "body without length"])
@pytest.mark.parametrize("secure", [False, True])
def test_a_slow_server_does_not_hold_anybody(where, secure, monkeypatch, tmp_path):
    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        if where == "head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        else:
            handler.send_response(200)
            if where == "body":
                handler.send_header("Content-Length", "1000000")
            handler.end_headers()
        while not stop.wait(0.05):  # faster than any time-out of a single read
            handler.wfile.write(b"a")

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    began = time.monotonic()
    try:
        if where == "connect":  # accepted by the kernel, never answered
            with socket.create_server(("127.0.0.1", 0)) as silent:
                url = f"http{'s' if secure else ''}://127.0.0.1:{silent.getsockname()[1]}/"
                with pytest.raises(InvalidPayload, match=r"within 0\.5 s"):
                    fetch(url, timeout=0.5, allow_private=True)
        else:
            with serve({"/": drip}, authority if secure else None) as (base, _):
                try:
                    with pytest.raises(InvalidPayload, match=r"within 0\.5 s"):
                        fetch(f"{base}/", timeout=0.5, allow_private=True)
                finally:
                    stop.set()
    finally:
        stop.set()
    assert time.monotonic() - began > 0.4  # it waited; without a time-out it would for ever


def test_https_checks_the_certificate(monkeypatch, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with serve({"/": send(b"safe")}, authority) as (base, _):
        with pytest.raises(InvalidPayload, match="certificate verify failed"):
            fetch(f"{base}/", allow_private=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert fetch(f"{base}/", allow_private=True)[0] == b"safe"
        with pytest.raises(InvalidPayload, match="certificate verify failed"):
            fetch(base.replace("localhost", "127.0.0.1") + "/", allow_private=True)


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serve({"/": send(b"direct")}) as (base, _):
        assert fetch(f"{base}/", allow_private=True)[0] == b"direct"
