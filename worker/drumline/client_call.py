"""One call of a client, without its I/O: what is sent, when to try again, what an answer or a failure means.

The synchronous and the asynchronous client share all of this; each adds nothing but the sending.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from drumline.client_errors import from_problem
from drumline.contract import REQUEST_ID_HEADER
from drumline.errors import (
    ConfigurationError,
    ConnectionFailed,
    DrumlineError,
    InvalidPayload,
    NotReady,
    QueueFull,
    RankHung,
    RankLost,
    RequestTimeout,
)

#: Longer than the bounds that a server has by itself (queue and run time): without a time-out its answer comes first.
_LONGEST_ANSWER = 4500.0
_CONNECT = 10.0
_LONGEST_PAUSE = 60.0
#: An event is one line and may hold several images.
_LARGEST_EVENT = 1 << 30
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream.

    Attributes:
        type: ``update`` or ``result`` (the last one); ``message`` from servers that do not name their events.
        id: 0, 1, 2, ... within the stream; None when the server counts otherwise.
        data: the JSON value; images are ``{"url": "data:...", "content_type", "width", "height"}``.
    """

    type: str
    id: int | None
    data: Any


@dataclass(frozen=True)
class ClientSettings:
    """What a client was made with."""

    url: str
    origin: str
    timeout: float | None
    retries: int
    silence: float
    headers: Mapping[str, str]
    limits: httpx2.Limits = field(default_factory=lambda: httpx2.Limits(max_connections=None))

    @classmethod
    def of(
        cls,
        url: str,
        *,
        api_key: str | None,
        timeout: float | None,
        retries: int,
        silence: float,
        headers: Mapping[str, str] | None,
    ) -> ClientSettings:
        """Check the arguments of a client."""
        parsed = _parse(url)
        origin = str(parsed.copy_with(path="/", query=None, fragment=None)).rstrip("/")
        sent = {"accept": "application/json", **(headers or {})}
        if api_key:
            sent["authorization"] = f"Key {api_key}"
        return cls(origin + parsed.path.rstrip("/"), origin, timeout, retries, silence, sent)

    def call(
        self,
        method: str,
        url: str,
        payload: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        streaming: bool = False,
    ) -> Call:
        """Return a call that was not sent; ``url`` is absolute."""
        limit = self.timeout if timeout is None else timeout
        return Call(
            method=method,
            url=url,
            content=None if method == "GET" else _encode(payload),
            headers=self.headers,
            request_id=request_id or secrets.token_hex(16),
            streaming=streaming,
            timeout=limit,
            silence=self.silence,
            retries=self.retries,
        )

    def endpoint(self, path: str) -> str:
        """Return the URL of an endpoint of the app."""
        return f"{self.url}/{path.lstrip('/')}"

    def mounts(self) -> dict[str, None]:
        """Return the addresses that no proxy of the environment can reach for us: those of this machine."""
        return {f"all://{host}": None for host in _LOOPBACK}


@dataclass
class Call:
    """One request of a client, with all its tries."""

    method: str
    url: str
    content: bytes | None
    headers: Mapping[str, str]
    request_id: str
    streaming: bool
    timeout: float | None
    silence: float
    retries: int
    deadline: float | None = None
    tries: int = 0

    def build(self, make: Callable[..., httpx2.Request]) -> httpx2.Request:
        """Return the HTTP request; ``make`` is a client's ``build_request``."""
        left = self.seconds_left() or _LONGEST_ANSWER
        read = min(left, self.silence) if self.streaming else left
        headers = {**self.headers, REQUEST_ID_HEADER: self.request_id}
        if self.deadline is not None:
            # The server stops the ranks by itself, also when this client is not there any more to say so.
            headers["x-request-timeout"] = f"{left:.3f}"
        if self.content is not None:
            headers["content-type"] = "application/json"
        if self.streaming:
            headers |= {"accept": "text/event-stream", "cache-control": "no-store"}
        timeout = httpx2.Timeout(read, connect=min(left, _CONNECT), pool=left)
        request: httpx2.Request = make(self.method, self.url, content=self.content, headers=headers, timeout=timeout)
        return request

    def seconds_left(self) -> float | None:
        """Return how much time is left, more than 0; None without a bound. The clock starts with the first question."""
        if self.timeout is None:
            return None
        if self.deadline is None:
            self.deadline = time.monotonic() + self.timeout
        return max(0.001, self.deadline - time.monotonic())

    def check_deadline(self) -> None:
        """Raise RequestTimeout when the time is over; called with every piece of an answer."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise self.timed_out()

    def timed_out(self) -> RequestTimeout:
        """The time-out of this call."""
        error = RequestTimeout(f"no answer from {self.url} within {self.timeout or _LONGEST_ANSWER:g} s")
        error.request_id = self.request_id
        return error

    def pause_after(self, error: DrumlineError) -> float:
        """Return the seconds to wait before the next try; raises ``error`` when there is none."""
        tries, self.tries = self.tries, self.tries + 1
        again = isinstance(error, QueueFull | NotReady | RankLost | RankHung)
        if isinstance(error, ConnectionFailed):
            again = not error.sent
        if not again or tries >= self.retries:
            raise error
        asked = error.retry_after if isinstance(error, QueueFull | NotReady) else None
        pause = min(0.1 * 2**tries, 5.0) if asked is None else min(asked, _LONGEST_PAUSE)
        if self.deadline is not None and time.monotonic() + pause >= self.deadline:
            raise error
        return pause

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise ours in place of httpx2's errors, with the request's id."""
        try:
            yield
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> DrumlineError:
        failed: DrumlineError
        why = str(error) or type(error).__name__
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout | httpx2.ProxyError):
            failed = ConnectionFailed(f"cannot reach {self.url}: {why}")
        elif isinstance(error, httpx2.SSEError):
            failed = DrumlineError(f"{self.url} does not answer with an event stream: {why}")
        elif isinstance(error, httpx2.TimeoutException):
            over = not self.streaming or (self.deadline is not None and time.monotonic() >= self.deadline)
            if over:
                return self.timed_out()
            failed = ConnectionFailed(f"{self.url} fell silent: nothing came for {self.silence:g} s", sent=True)
        else:
            failed = ConnectionFailed(f"the connection to {self.url} broke: {why}", sent=True)
        failed.request_id = self.request_id
        return failed

    def result(self, content_type: str, body: bytes) -> Any:
        """Return the JSON value of an answer.

        Raises:
            DrumlineError: it is not JSON.
        """
        if not body:
            return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            error = DrumlineError(f"{self.url} answered with {content_type or 'something'}, which is not JSON")
            error.request_id = self.request_id
            raise error from None


class Events:
    """Turns what a stream delivers into events, until its terminal one."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._named = False

    @staticmethod
    def source(response: httpx2.Response) -> httpx2.EventSource:
        """Return httpx2's reader of event streams for ``response``."""
        return httpx2.EventSource(response, max_event_size=_LARGEST_EVENT)

    def take(self, received: httpx2.ServerSentEvent) -> Event:
        """Return the event; an ``error`` event is raised as the error it stands for."""
        try:
            data = json.loads(received.data) if received.data else None
        except (ValueError, RecursionError):
            data = received.data
        if received.event == "error":
            error = from_problem(data if isinstance(data, dict) else {"error": received.data})
            error.request_id = error.request_id or self._call.request_id
            raise error
        self._named = self._named or received.event != "message"
        number = int(received.id) if received.id.isascii() and received.id.isdigit() else None
        return Event(received.event, number, data)

    def ended(self) -> None:
        """The stream is over without a terminal event; that is as it should be only where events have no names."""
        if self._named:
            error = ConnectionFailed(f"the stream from {self._call.url} ended before its result", sent=True)
            error.request_id = self._call.request_id
            raise error


def tls(verify: bool | str) -> ssl.SSLContext | bool:
    """Return what httpx2 takes for ``verify``; a path is read here, so that a wrong one is told as such.

    Raises:
        ConfigurationError: the file is missing or holds no certificate.
    """
    if isinstance(verify, bool):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{verify}: not a PEM file of certificate authorities: {error}") from None


def _parse(url: str) -> httpx2.URL:
    cure = "write http://host:port or https://host[/namespace/name]"
    try:
        parsed = httpx2.URL(url if "://" in url else f"http://{url}")
    except (httpx2.InvalidURL, TypeError, ValueError) as error:
        raise ConfigurationError(f"url {url!r}: {error}; {cure}") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigurationError(f"url {url!r}: not an address of a web server; {cure}")
    return parsed


def _encode(payload: Mapping[str, Any] | None) -> bytes:
    try:
        return json.dumps(dict(payload or {}), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidPayload(f"the payload is not JSON: {error}") from None
