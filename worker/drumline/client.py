"""Clients for an app that drumline serves: :class:`Client`, and :class:`AsyncClient` with the same methods.

    with Client("http://localhost:8080") as app:
        result = app.invoke({"prompt": "a lighthouse"})
        for event in app.stream({"prompt": "a lighthouse"}):
            print(event.type, event.data)          # "update" ... then exactly one "result"
        result, files = save_images(result, "out", "lighthouse")

What the server reports as a problem is raised as the error that caused it, of the tree in ``drumline.errors``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, cast

import httpx2

from drumline.client_call import Call, ClientSettings, Event, Events, tls
from drumline.client_errors import from_response
from drumline.errors import DrumlineError
from drumline.media import Saved, save_images

__all__ = ["AsyncClient", "AsyncEventStream", "Client", "Event", "EventStream", "Saved", "save_images"]


class Client:
    """Calls one app. Safe to share between threads.

    Args:
        url: where the app is: ``http://host:8080``, with ``/{namespace}/{name}`` behind a shared address. Without a
            scheme: http.
        api_key: sent as ``Authorization: Key <api_key>``.
        timeout: seconds for one request, its wait in the queue included; a method's own ``timeout`` wins.
        retries: how often a request is sent again when the server could not be reached or answered 429 or 503. The wait
            between is the server's ``Retry-After``, else 0.1 s, doubling. A 503 for a lost rank may mean that the
            request ran in part, so the default is never.
        silence: seconds without a byte after which a stream counts as broken; servers send a comment every 15 s.
        verify: False accepts any certificate; a path is a PEM file of certificate authorities.
        headers: sent with every request.

    Raises:
        ConfigurationError: ``url`` is none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        silence: float = 60.0,
        verify: bool | str = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = ClientSettings.of(
            url, api_key=api_key, timeout=timeout, retries=retries, silence=silence, headers=headers
        )
        self._http = httpx2.Client(verify=tls(verify), mounts=self._settings.mounts(), limits=self._settings.limits)

    @property
    def url(self) -> str:
        """The app's address, without a slash at its end."""
        return self._settings.url

    def invoke(
        self,
        payload: Mapping[str, Any] | None = None,
        path: str = "/",
        timeout: float | None = None,
        *,
        request_id: str | None = None,
    ) -> Any:
        """Run one request and return its result.

        Args:
            payload: the request's JSON object.
            path: the endpoint; ``/`` is the worker itself.
            timeout: seconds; default: the client's.
            request_id: its id in logs and for :meth:`cancel`; default: a new one.

        Returns:
            The result as JSON: images are ``{"url": "data:...", "content_type", "width", "height"}``.

        Raises:
            DrumlineError: as the app raised it: InvalidPayload, QueueFull, WorkerError, RankLost, RequestTimeout, ...
            ConnectionFailed: no server, or the connection broke.
        """
        call = self._settings.call(
            "POST", self._settings.endpoint(path), payload, timeout=timeout, request_id=request_id
        )
        return self._answer(call)

    def stream(
        self,
        payload: Mapping[str, Any] | None = None,
        path: str = "/stream",
        timeout: float | None = None,
        *,
        request_id: str | None = None,
    ) -> EventStream:
        """Run one request and iterate over its events as they come: updates, then one ``result``.

        The request is sent with the first event asked for. Closing the stream (or leaving its ``with`` block) early
        cancels the request. Arguments as of :meth:`invoke`.

        Raises:
            DrumlineError: while iterating, as of :meth:`invoke`; also when the request fails after some updates.
        """
        url = self._settings.endpoint(path)
        call = self._settings.call("POST", url, payload, timeout=timeout, request_id=request_id, streaming=True)
        return EventStream(self._events(call), call.request_id)

    def status(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return the app's ``/status``: ``state, worldSize, readyRanks, ranks, restarts, lastFailure, ...``."""
        answer = self._answer(self._settings.call("GET", f"{self._settings.origin}/status", timeout=timeout))
        return dict(answer)

    def cancel(self, request_id: str, timeout: float = 30.0) -> bool:
        """Cancel a waiting or running request; False when there is none of that id (any more)."""
        url = f"{self._settings.origin}/requests/{request_id}/cancel"
        with self._send(self._settings.call("POST", url, timeout=timeout), absent_is_fine=True) as response:
            return response.status_code != 404

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call) -> Any:
        with self._send(call) as response:
            with call.errors():
                body = response.read()
            return call.result(response.headers.get("content-type", ""), body)

    @contextlib.contextmanager
    def _send(self, call: Call, absent_is_fine: bool = False) -> Iterator[httpx2.Response]:
        """The response to a call, its body unread; tries are repeated as the caller asked.

        Raises:
            DrumlineError: what a status from 400 on stands for (of 404 only unless ``absent_is_fine``).
        """
        while True:
            try:
                response = self._try(call, absent_is_fine)
            except DrumlineError as error:
                pause = call.pause_after(error)
            else:
                break
            time.sleep(pause)
        try:
            yield response
        finally:
            response.close()

    def _try(self, call: Call, absent_is_fine: bool) -> httpx2.Response:
        with call.errors():
            response = self._http.send(call.build(self._http.build_request), stream=True)
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _Bounded(response.stream, call)
            status = response.status_code
            if status < 400 or (absent_is_fine and status == 404):
                return response
            try:
                body = response.read()
            finally:
                response.close()
            raise from_response(status, response.headers, body, call.url)

    def _events(self, call: Call) -> Generator[Event]:
        with self._send(call) as response, call.errors():
            events = Events(call)
            for received in events.source(response):
                event = events.take(received)
                yield event
                if event.type == "result":
                    return
            events.ended()


class _Bounded(httpx2.SyncByteStream):
    """A response's bytes, as long as the call has time left."""

    def __init__(self, stream: httpx2.SyncByteStream, call: Call) -> None:
        self._stream = stream
        self._call = call

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._call.check_deadline()
            yield chunk

    def close(self) -> None:
        self._stream.close()


class EventStream(Iterator[Event]):
    """The events of one request; an iterator, and a context manager that cancels the request when it is left early.

    Attributes:
        request_id: the request's id.
    """

    def __init__(self, events: Generator[Event], request_id: str) -> None:
        self._events = events
        self.request_id = request_id

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End the stream; a request that is still waiting or running is cancelled."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """:class:`Client` for asyncio: same arguments, same methods, to be awaited."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        silence: float = 60.0,
        verify: bool | str = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = ClientSettings.of(
            url, api_key=api_key, timeout=timeout, retries=retries, silence=silence, headers=headers
        )
        self._http = httpx2.AsyncClient(
            verify=tls(verify), mounts=self._settings.mounts(), limits=self._settings.limits
        )

    @property
    def url(self) -> str:
        """The app's address, without a slash at its end."""
        return self._settings.url

    async def invoke(
        self,
        payload: Mapping[str, Any] | None = None,
        path: str = "/",
        timeout: float | None = None,
        *,
        request_id: str | None = None,
    ) -> Any:
        """Run one request and return its result; as :meth:`Client.invoke`. Cancelling the task cancels the request."""
        call = self._settings.call(
            "POST", self._settings.endpoint(path), payload, timeout=timeout, request_id=request_id
        )
        return await self._answer(call)

    def stream(
        self,
        payload: Mapping[str, Any] | None = None,
        path: str = "/stream",
        timeout: float | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncEventStream:
        """Run one request and iterate over its events; as :meth:`Client.stream`, with ``async for``/``async with``."""
        url = self._settings.endpoint(path)
        call = self._settings.call("POST", url, payload, timeout=timeout, request_id=request_id, streaming=True)
        return AsyncEventStream(self._events(call), call)

    async def status(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return the app's ``/status``; as :meth:`Client.status`."""
        answer = await self._answer(self._settings.call("GET", f"{self._settings.origin}/status", timeout=timeout))
        return dict(answer)

    async def cancel(self, request_id: str, timeout: float = 30.0) -> bool:
        """Cancel a waiting or running request; False when there is none of that id (any more)."""
        url = f"{self._settings.origin}/requests/{request_id}/cancel"
        async with self._send(self._settings.call("POST", url, timeout=timeout), absent_is_fine=True) as response:
            return response.status_code != 404

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _answer(self, call: Call) -> Any:
        async with _within(call), self._send(call) as response:
            with call.errors():
                body = await response.aread()
            return call.result(response.headers.get("content-type", ""), body)

    @contextlib.asynccontextmanager
    async def _send(self, call: Call, absent_is_fine: bool = False) -> AsyncIterator[httpx2.Response]:
        while True:
            try:
                response = await self._try(call, absent_is_fine)
            except DrumlineError as error:
                pause = call.pause_after(error)
            else:
                break
            await asyncio.sleep(pause)
        try:
            yield response
        finally:
            await response.aclose()

    async def _try(self, call: Call, absent_is_fine: bool) -> httpx2.Response:
        with call.errors():
            response = await self._http.send(call.build(self._http.build_request), stream=True)
            status = response.status_code
            if status < 400 or (absent_is_fine and status == 404):
                return response
            try:
                body = await response.aread()
            finally:
                await response.aclose()
            raise from_response(status, response.headers, body, call.url)

    async def _events(self, call: Call) -> AsyncGenerator[Event]:
        async with self._send(call) as response:
            with call.errors():
                events = Events(call)
                reader = cast("AsyncGenerator[httpx2.ServerSentEvent]", aiter(events.source(response)))
                async with contextlib.aclosing(reader) as source:
                    async for received in source:
                        event = events.take(received)
                        yield event
                        if event.type == "result":
                            return
                events.ended()


class AsyncEventStream(AsyncIterator[Event]):
    """:class:`EventStream` for asyncio. Leave it through ``async with``, or it ends when the garbage is collected.

    Attributes:
        request_id: the request's id.
    """

    def __init__(self, events: AsyncGenerator[Event], call: Call) -> None:
        self._events = events
        self._call = call
        self.request_id = call.request_id

    async def __anext__(self) -> Event:
        async with _within(self._call):
            return await anext(self._events)

    async def close(self) -> None:
        """End the stream; a request that is still waiting or running is cancelled."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


@contextlib.asynccontextmanager
async def _within(call: Call) -> AsyncIterator[None]:
    """Bound what happens inside by the call's deadline, to the moment."""
    try:
        async with asyncio.timeout(call.seconds_left()):
            yield
    except TimeoutError as error:
        if isinstance(error, DrumlineError):  # the server's own time-out is one, too
            raise
        raise call.timed_out() from None
