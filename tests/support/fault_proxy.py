"""A proxy between the operator and a real API server that breaks what passes through it, as a network and a server do.

What happens to a call is decided by a plan: a function of the call. The proxy keeps account of all calls, so that a test
can say that nothing was written.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml
from aiohttp import web
from yarl import URL

#: Headers that belong to one connection, or that aiohttp writes itself.
_OWN = {
    "connection",
    "content-length",
    "content-encoding",
    "host",
    "keep-alive",
    "transfer-encoding",
    "accept-encoding",
}


@dataclass(frozen=True)
class Call:
    """One request. ``number`` counts from 0."""

    number: int
    method: str
    path: str
    watch: bool
    body: bytes = b""

    @property
    def write(self) -> bool:
        """Whether it may change an object; Leases and Events do not count."""
        return self.method != "GET" and not self.path.rstrip("/").endswith("/events") and "/leases" not in self.path


@dataclass(frozen=True)
class Drop:
    """Break the connection without an answer, before the API server has heard of the call or after it has done it."""

    done: bool = False


@dataclass(frozen=True)
class Delay:
    """Pass the call on after some time."""

    seconds: float


@dataclass(frozen=True)
class Refuse:
    """Answer instead of the API server."""

    status: int
    retry_after: int | None = None


@dataclass(frozen=True)
class Cut:
    """Pass on this many bytes of the answer, and break the connection."""

    bytes: int


@dataclass(frozen=True)
class Act:
    """Do something before the call is passed on, or after it was done; then break the connection."""

    what: Callable[[], Awaitable[Any]]
    done: bool = False


Fault = Drop | Delay | Refuse | Cut | Act
Plan = Callable[[Call], Fault | None]


class FaultProxy:
    """Listens on the loopback interface for the time of an ``async with`` block.

    Args:
        kubeconfig: of the API server's administrator.
        folder: gets a kubeconfig that leads to the proxy.
        plan: decides; can be set anew at any time. None: nothing is broken.
    """

    def __init__(self, kubeconfig: Path, folder: Path, plan: Plan | None = None) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        self._upstream = document["clusters"][0]["cluster"]["server"]
        pki = kubeconfig.parent / "pki"
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self.kubeconfig = folder / "proxy.kubeconfig"
        self.plan: Plan | None = plan
        self.calls: list[Call] = []
        #: What was done to which call.
        self.faults: list[tuple[Call, Fault]] = []
        #: Watches that pass through, by path.
        self._watched: Counter[str] = Counter()
        self._watches_changed = asyncio.Condition()
        self._under_way: set[asyncio.Task[web.StreamResponse]] = set()

    @property
    def writes(self) -> int:
        """Calls so far that may have changed something."""
        return sum(call.write for call in self.calls)

    async def all_watched(self) -> None:
        """Return when everything that was ever watched is being watched, with nothing in the way."""
        paths = {call.path for call in self.calls if call.watch}
        async with self._watches_changed:
            await self._watches_changed.wait_for(lambda: paths <= self._watched.keys())

    async def quiet(self) -> None:
        """Return when every call that was held up has come in."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def __aenter__(self) -> Self:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=limits, auto_decompress=True)
        # With cancellation a caller that is gone ends its watches here, too.
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        self._listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, self._listener).start()
        port = self._listener.getsockname()[1]
        self.kubeconfig.write_text(yaml.safe_dump(_kubeconfig(f"http://127.0.0.1:{port}")))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for late in self._under_way:
            late.cancel()
        await self.quiet()
        # An operator that lives connects again and again. Nobody closes what is being accepted when a server closes
        # (asyncio, Python 3.11 and 3.12), so it stops to listen first; these turns give what it has accepted to the server.
        asyncio.get_running_loop().remove_reader(self._listener)
        for _ in range(3):
            await asyncio.sleep(0)
        try:
            await self._runner.cleanup()
        finally:
            await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        call = Call(len(self.calls), request.method, request.path, request.query.get("watch") in {"true", "1"}, body)
        self.calls.append(call)
        fault = self.plan(call) if self.plan else None
        if fault is not None:
            self.faults.append((call, fault))
        match fault:
            case Drop(done=False):
                return _broken(request)
            case Act(what, done=False):
                await what()
                return _broken(request)
            case Delay(seconds) if call.watch:
                await asyncio.sleep(seconds)
                fault = None
            case Delay(seconds):
                # The caller may go away meanwhile; the call comes in all the same.
                late = asyncio.create_task(self._late(seconds, request, body))
                self._under_way.add(late)
                late.add_done_callback(self._under_way.discard)
                return await asyncio.shield(late)
            case Refuse(status, retry_after):
                return _refusal(status, retry_after)
        if not call.watch:
            return await self._forward(request, body, fault)
        await self._watching(call.path, 1)
        try:
            return await self._forward(request, body, fault)
        finally:
            await asyncio.shield(self._watching(call.path, -1))

    async def _watching(self, path: str, change: int) -> None:
        async with self._watches_changed:
            self._watched[path] += change
            self._watched = +self._watched
            self._watches_changed.notify_all()

    async def _late(self, seconds: float, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        try:
            return await self._forward(request, body, None)
        except (OSError, aiohttp.ClientError):
            return web.Response(status=502)  # nobody is there any more who would read it

    async def _forward(self, request: web.BaseRequest, body: bytes, fault: Fault | None) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN}
        url = URL(f"{self._upstream}{request.raw_path}", encoded=True)
        async with self._session.request(request.method, url, data=body or None, headers=headers) as answer:
            if fault is None or isinstance(fault, Cut):
                return await self._pass_on(request, answer, fault.bytes if isinstance(fault, Cut) else None)
            if not request.query.get("watch"):
                await answer.read()  # it is done; a watch never is
            if isinstance(fault, Act):
                await fault.what()
            return _broken(request)

    async def _pass_on(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, most: int | None
    ) -> web.StreamResponse:
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in _OWN}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            if most is not None and len(chunk) >= most:
                await response.write(chunk[:most])
                return _broken(request)
            if most is not None:
                most -= len(chunk)
            await response.write(chunk)
        if most is not None:
            return _broken(request)
        await response.write_eof()
        return response


class Storm:
    """A plan: so many of the calls go wrong, in one way or another.

    Args:
        seed: of the dice.
        rate: share of the calls, 0 to 1; can be changed at any time.
        delay: seconds that a call is held up at most.
    """

    def __init__(self, seed: int, rate: float, delay: float = 0.3) -> None:
        self._dice = random.Random(seed)
        self.rate, self._delay = rate, delay

    def __call__(self, call: Call) -> Fault | None:
        if self._dice.random() >= self.rate:
            return None
        common: list[Fault] = [
            Drop(),
            Delay(self._dice.uniform(0, self._delay)),
            Refuse(429, retry_after=1),
            Refuse(500),
            Refuse(503),
            Cut(self._dice.randrange(2000)),
        ]
        if call.method != "GET":
            common += [Drop(done=True), Drop(done=True), Refuse(409)]
        return self._dice.choice(common)


def _broken(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    raise asyncio.CancelledError  # ends this connection's handler; there is nobody to answer


def _refusal(status: int, retry_after: int | None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": "broken by the proxy"}
    return web.Response(status=status, text=json.dumps(body), content_type="application/json", headers=headers)


def _kubeconfig(url: str) -> Mapping[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "proxy", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
        "current-context": "proxy",
    }
