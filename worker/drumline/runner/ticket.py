"""One request as its caller sees it: updates while it runs, then a result or an error."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from drumline import codec, problems, sse
from drumline.codec import Packed
from drumline.errors import DrumlineError, RequestCancelled, RequestTimeout

_BIG = 1 << 20


class _Idle:
    def __repr__(self) -> str:
        return "IDLE"


#: What :meth:`Ticket.next` returns when nothing came within its time-out.
IDLE: Final = _Idle()


class Ticket:
    """A request that the runner has accepted.

    Attributes:
        request_id: the caller's name for it.
        queue_wait: seconds it waited for its turn; None until it is given to the ranks.
        run_time: seconds from then to its end; None until it is over or when it never ran.
        outcome: ``ok`` or the suffix of its problem type; None until it is over.
        stopped_steps: for a cancelled request, the step at which each rank left it.
    """

    __slots__ = (
        "__weakref__", "_buffer_limit", "_buffered", "_cancel", "_error", "_on_over", "_over", "_silence", "_silence_limit",
        "_updates", "_waiters", "caller", "deadline", "first_event_at", "headers", "images", "number", "outcome", "payload",
        "queue_wait", "queued_at", "request_id", "run_time", "started_at", "stopped_steps", "streaming", "timers", "value",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        request_id: str,
        caller: str,
        payload: Packed,
        *,
        streaming: bool,
        images: str,
        deadline: float,
        headers: dict[str, str],
        buffer_limit: int,
        cancel: Callable[[int, DrumlineError], None],
    ) -> None:
        self.number = number
        self.request_id = request_id
        self.caller = caller
        self.payload: Packed | None = payload
        self.streaming = streaming
        self.images = images
        self.deadline = deadline
        self.headers = headers
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self.first_event_at: float | None = None
        self.queue_wait: float | None = None
        self.run_time: float | None = None
        self.outcome: str | None = None
        self.stopped_steps: dict[int, int] = {}
        self.value: Packed | None = None
        self.timers: list[asyncio.TimerHandle] = []
        self._cancel = cancel
        self._buffer_limit = buffer_limit
        self._buffered = 0
        self._updates: deque[Packed] = deque()
        self._error: DrumlineError | None = None
        self._over = False
        self._on_over: Callable[[], None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._silence_limit: float | None = None
        self._silence: asyncio.TimerHandle | None = None

    @property
    def done(self) -> bool:
        """True when the request is over (updates may still wait to be read)."""
        return self._over

    # -- the runner's side

    def push(self, update: Packed) -> None:
        """Keep one update for the reader; too many unread bytes cancel the request."""
        if self._over:
            return
        self._updates.append(update)
        self._buffered += size_of(update)
        if self._silence is not None:
            self._watch_silence()
        if self._buffered > self._buffer_limit:
            limit = self._buffer_limit >> 20
            self.cancel(f"the reader is too slow: more than {limit} MiB of updates wait for it")
        self._wake()

    def finish(self, error: DrumlineError | None) -> None:
        """End the request, with :attr:`value` when ``error`` is None."""
        now = time.monotonic()
        if self.started_at is not None:
            self.run_time = now - self.started_at
        else:
            self.queue_wait = now - self.queued_at
        self._over, self._error = True, error
        self.outcome = "ok" if error is None else problems.outcome(error)
        if error is not None:
            self.value = None
        self.payload = None
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def tell(self) -> None:
        """Call whoever wanted to be called, see :meth:`when_over`."""
        told, self._on_over = self._on_over, None
        if told is not None:
            told()

    # -- the caller's side

    def when_over(self, told: Callable[[], None]) -> None:
        """Call ``told`` in the turn of the event loop in which the request ends, at once if it has; it may not raise."""
        self._on_over = told
        if self._over:
            self.tell()

    def cancel(self, reason: str = "the request was cancelled") -> None:
        """Cancel the request; it ends soon with ``RequestCancelled``. Without effect when it is over."""
        if not self._over:
            self._cancel(self.number, RequestCancelled(reason))

    def limit_silence(self, seconds: float | None) -> None:
        """Cancel the request when ``seconds`` pass without an update; None sets no limit."""
        self._silence_limit = seconds
        self._watch_silence()

    def _watch_silence(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if self._silence_limit is not None and not self._over:
            self._silence = asyncio.get_running_loop().call_later(self._silence_limit, self._silent)

    def _silent(self) -> None:
        if not self._over:
            error = RequestTimeout(f"no update for {self._silence_limit:g} s")
            self._cancel(self.number, error)

    async def wait(self) -> None:
        """Wait for the end, however it is."""
        while not self._over:
            await self._changed()

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def result(self) -> Packed:
        """Wait for the end and return rank 0's value as it lies on the wire.

        Raises:
            DrumlineError: how the request failed.
        """
        while not self._over:
            await self._changed()
        if self._error is not None:
            raise self._error
        assert self.value is not None
        return self.value

    async def next(self, timeout: float | None = None) -> Packed | _Idle | None:
        """Return the next update; None when the request is over and all were read; IDLE after ``timeout`` seconds."""
        while not self._updates:
            if self._over:
                return None
            if timeout is None:
                await self._changed()
                continue
            try:
                async with asyncio.timeout(timeout):
                    await self._changed()
            except TimeoutError:
                return IDLE
        return self._take()

    def _take(self) -> Packed:
        update = self._updates.popleft()
        self._buffered -= size_of(update)
        return update

    async def updates(self) -> AsyncIterator[Packed]:
        """Yield every update in order; ends when the request is over, however it ended (see :meth:`result`)."""
        while isinstance(update := await self.next(), Packed):
            yield update

    async def text_events(self, keepalive: float = 15.0, *, joined: int = 0) -> AsyncIterator[bytes]:
        """Yield the request as server-sent events: updates, pings in silence, exactly one terminal event.

        Closing the iterator early cancels the request. Never raises what the request failed with: that is the terminal
        event.

        Args:
            keepalive: longest silence in seconds.
            joined: small updates that already wait are joined up to so many bytes; 0 yields every event by itself.
        """
        id = 0
        try:
            while (update := await self.next(keepalive)) is not None:
                if isinstance(update, _Idle):
                    yield sse.PING
                    continue
                text = sse.update(id, await to_json(update))
                id += 1
                if joined and self._updates:
                    texts, failure = self._waiting_texts(id, joined - len(text))
                    id += len(texts)
                    text = b"".join((text, *texts))
                    yield text
                    if failure is not None:
                        raise failure
                else:
                    yield text
            yield sse.result(id, await to_json(await self.result()))
        except DrumlineError as error:
            self.cancel(f"an update could not be sent: {error}")
            yield sse.error(id, problems.from_error(error, self.request_id).body())
        finally:
            self.cancel("the reader went away")

    def _waiting_texts(self, id: int, room: int) -> tuple[list[bytes], DrumlineError | None]:
        """Take small updates that wait, ``room`` bytes of text or a little more; stop at one that cannot be carried."""
        texts: list[bytes] = []
        while self._updates and room > 0 and is_small(self._updates[0]):
            update = self._take()
            try:
                texts.append(sse.update(id + len(texts), codec.to_json(update.data, update.buffers)))
            except DrumlineError as error:
                return texts, error
            room -= len(texts[-1])
        return texts, None


def size_of(packed: Packed) -> int:
    """Return the bytes that ``packed`` holds."""
    return len(packed.data) + sum(memoryview(b).nbytes for b in packed.buffers)


def is_small(packed: Packed) -> bool:
    """Whether ``packed`` is turned into JSON faster than it is handed to a thread."""
    return size_of(packed) < _BIG


async def to_json(packed: Packed) -> bytes:
    """Return ``packed`` as JSON; large values are encoded in a thread so that nobody else waits."""
    if is_small(packed):
        return codec.to_json(packed.data, packed.buffers)
    encoded: Any = await asyncio.to_thread(codec.to_json, packed.data, packed.buffers)
    return bytes(encoded)
