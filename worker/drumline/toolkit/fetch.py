"""Bytes behind a URL that a stranger sent: data URIs with a size limit, http(s) without a way into our own network.

A name is resolved once, all its addresses must be public, and the connection goes to exactly the address that was
checked; every redirect is checked the same way. Proxies from the environment are not used: they would undo that.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

from drumline.details import problem
from drumline.errors import InvalidPayload

#: Largest file that is read unless the caller says otherwise.
MAX_BYTES: Final = 100 << 20
#: Seconds for a whole download.
DEFAULT_TIMEOUT: Final = 30.0
ALLOW_PRIVATE_VARIABLE: Final = "DRUMLINE_ALLOW_PRIVATE_URLS"
_MAX_REDIRECTS = 5
_CHUNK = 64 << 10
#: Characters of a path or query that stay as they are: they are quoted already, or need it not.
_TARGET = "/%:@!$&'()*+,;=~?-._"
#: IPv6 addresses that stand for an IPv4 address of a translating gateway.
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def decode_data_uri(uri: str, *, max_bytes: int = MAX_BYTES) -> tuple[bytes, str]:
    """Return bytes and media type of a ``data:`` URI.

    Raises:
        InvalidPayload: it is malformed, or longer than ``max_bytes`` decoded.
    """
    head, comma, body = uri.removeprefix("data:").partition(",")
    media_type, *parameters = head.split(";")
    if not comma or not uri.startswith("data:"):
        raise _refused("a data URL has the form data:<media type>;base64,<data>")
    is_base64 = "base64" in parameters
    if len(body) * (3 if is_base64 else 1) > (max_bytes + 2) * (4 if is_base64 else 3):
        raise _too_large(max_bytes)
    try:
        raw = unquote_to_bytes(body)
        data = base64.b64decode(raw, validate=True) if is_base64 else raw
    except (binascii.Error, ValueError):
        raise _refused("the data URL is not valid base64") from None
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data, media_type or "text/plain"


def fetch(
    url: str, *, max_bytes: int = MAX_BYTES, timeout: float = DEFAULT_TIMEOUT, allow_private: bool | None = None
) -> tuple[bytes, str]:
    """Download an http(s) URL; return its bytes and media type.

    Args:
        url: absolute.
        max_bytes: a larger answer is refused, as early as its headers tell.
        timeout: seconds from connecting to the last byte, redirects included.
        allow_private: reach loopback, private and link-local addresses, too; None: the environment variable
            ``DRUMLINE_ALLOW_PRIVATE_URLS`` (``true``), else no.

    Raises:
        InvalidPayload: the URL is malformed or leads to a private address, the server does not answer in time or not
            with 200, or the file is too large.
    """
    if allow_private is None:
        allow_private = os.environ.get(ALLOW_PRIVATE_VARIABLE, "").strip().lower() in {"1", "true", "yes"}
    deadline = time.monotonic() + timeout
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _parts(url)
        try:
            with _connection(parts, deadline, allow_private=allow_private) as (connection, is_late):
                answer = _ask(connection, parts)
                location = answer.getheader("Location")
                if answer.status in {301, 302, 303, 307, 308} and location:
                    url = urljoin(url, location)
                    continue
                if answer.status != 200:
                    raise _refused(f"{parts.hostname} answered {answer.status}")
                media_type = (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower()
                data = _read(answer, max_bytes)
                if is_late.is_set():
                    raise TimeoutError  # what was cut off may look like the end of a file
                return data, media_type or "application/octet-stream"
        except (TimeoutError, OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise _refused(f"{parts.hostname} did not send the file within {timeout:g} s") from None
            raise _refused(f"{parts.hostname} cannot be read: {error or type(error).__name__}") from None
    raise _refused(f"more than {_MAX_REDIRECTS} redirects")


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise _refused(f"the URL is malformed: {error}") from None


def _ask(connection: http.client.HTTPConnection, parts: SplitResult) -> http.client.HTTPResponse:
    target = quote(parts.path or "/", safe=_TARGET) + (f"?{quote(parts.query, safe=_TARGET)}" if parts.query else "")
    connection.request(
        "GET", target, headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "drumline"}
    )
    return connection.getresponse()


def _read(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if answer.getheader("Content-Encoding", "identity") not in {"identity", ""}:
        raise _refused("the server compressed the file, which it was asked not to do")
    if answer.length is not None and answer.length > max_bytes:
        raise _too_large(max_bytes)
    expected, parts, size = answer.length, [], 0
    while chunk := answer.read1(_CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
    if expected is not None and size < expected:
        raise http.client.IncompleteRead(b"", expected - size)
    return b"".join(parts)


@contextmanager
def _connection(
    parts: SplitResult, deadline: float, *, allow_private: bool
) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
    """Connect to a checked address; at ``deadline`` (monotonic) the event is set and the connection cut."""
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _refused("the URL is not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise _refused("the URL holds a user name or password")
    usual = 443 if parts.scheme == "https" else 80
    port = parts.port or usual
    current = _connect(_addresses(parts.hostname, port, allow_private=allow_private), port, deadline)
    try:
        if parts.scheme == "https":  # the whole handshake is bounded by the socket's time-out
            current = ssl.create_default_context().wrap_socket(current, server_hostname=parts.hostname)
        is_late = threading.Event()
        # Bounds single reads by the socket's time-out, and a server that sends a byte now and then by cutting it off.
        timer = threading.Timer(_left(deadline), _cut, (current, is_late))
        timer.daemon = True
        timer.start()
        try:
            connection = http.client.HTTPConnection(parts.hostname, port)
            connection.default_port = usual  # not repeated in the Host header
            connection.sock = current
            yield connection, is_late
        finally:
            timer.cancel()
            timer.join()
    finally:
        current.close()


def _cut(current: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with contextlib.suppress(OSError):
        # The plain socket's method: TLS's own changes what a read in another thread is using.
        socket.socket.shutdown(current, socket.SHUT_RDWR)


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    for position, address in enumerate(addresses):
        try:
            return socket.create_connection((address, port), timeout=_left(deadline))
        except OSError:
            if position == len(addresses) - 1 or time.monotonic() >= deadline:
                raise
    raise OSError("the name has no address")


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _addresses(host: str, port: int, *, allow_private: bool) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise _refused(f"{host} is not a public address")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when an IPv4 address hides in an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if hidden is None and ip in _TRANSLATED:
            hidden = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if hidden is not None:
            return is_public(str(hidden))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _refused(message: str) -> InvalidPayload:
    return InvalidPayload(f"url: {message}", detail=[problem(["body", "url"], message, "url")])


def _too_large(max_bytes: int) -> InvalidPayload:
    return _refused(f"the file is larger than {max_bytes} bytes")
