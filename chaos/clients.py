"""Clients: each sends one request after another, in every manner that clients have, and judges what comes back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from chaos.model import ID_PREFIX, Ledger, Request, Seen, poison_ends
from chaos.supervisor import Pod
from drumline.testing.poison import DEEDS, RAISES, RESULTS

#: Far above what any request may take: the model has the limits.
_CLIENT_LIMIT = 90.0
#: A fault shows in answers up to this many seconds later: the group restarts, and a rank says that its peer is gone.
_AFTERMATH = 30.0
#: These damage a rank for all that come after, as user code may; ``tests/process/test_poison.py`` has them.
_FOR_GOOD = {"no descriptors", "descriptors again", "close descriptor 1"}
ACTS = sorted({*RESULTS, *RAISES, *DEEDS} - _FOR_GOOD)

Manner = Callable[["Clients", aiohttp.ClientSession, random.Random], Awaitable[bool]]


@dataclass
class Clients:
    """A number of callers that go on until they are told to stop.

    Attributes:
        pod: who is asked.
        ledger: where the verdicts go.
        seed: of all random choices; every request of every caller has a stream of its own.
        count: requests that have begun.
        over: finish what has begun, begin nothing.
    """

    pod: Pod
    ledger: Ledger
    seed: int
    count: int = 0
    over: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _running: dict[int, asyncio.Timeout] = field(default_factory=dict)
    _cancelled: set[int] = field(default_factory=set)
    _dropped: set[int] = field(default_factory=set)
    _paused: bool = False
    _hits: list[tuple[float, int]] = field(default_factory=list)
    _poisons: dict[int, int] = field(default_factory=dict)
    _past_poisons: list[tuple[float, int]] = field(default_factory=list)
    _session: aiohttp.ClientSession | None = None

    # -- what the driver does with them

    async def until(self, count: int) -> None:
        """Wait until ``count`` requests have begun."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.count >= count)

    async def pause(self) -> None:
        """Let every request end, begin no other, and close all connections."""
        self._paused = True
        async with self._changed:
            await self._changed.wait_for(lambda: not self._running)

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._paused = False
        await self._tell()

    def drop(self) -> int:
        """Close every connection in the middle of everything; return how many there were."""
        self._dropped |= set(self._running)
        for timeout in self._running.values():
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())
        return len(self._running)

    async def cancel_all(self) -> None:
        """Cancel every request that is known, through HTTP."""
        numbers = list(self._running)
        self._cancelled |= set(numbers)
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self.pod.post(f"/requests/{ID_PREFIX}{number}/cancel"))

    async def burst(self, count: int) -> None:
        """Ask ``count`` things at once."""
        assert self._session is not None
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(_plain(self, self._session, random.Random(f"{self.seed}-burst-{self.count}")))

    async def ask_hasty(self, seconds: float) -> None:
        """Ask for something long with a time-out of ``seconds``; judged like everything else."""
        assert self._session is not None
        await _hasty(self, self._session, random.Random(f"{self.seed}-hasty-{self.count}"), seconds)

    def hit(self, *ranks: int) -> None:
        """Note that a fault hits ``ranks``; -1 is the parent of all."""
        self._hits += [(time.monotonic(), rank) for rank in ranks]

    def hits_since(self, began: float) -> frozenset[int]:
        """Return the ranks that were hit since ``began`` (monotonic seconds), and those that a poison may take now."""
        self._hits = [hit for hit in self._hits if hit[0] > time.monotonic() - 2 * _CLIENT_LIMIT]
        return frozenset(rank for at, rank in self._hits if at >= began) | frozenset(self._poisons.values())

    def poisoned(self, began: float) -> frozenset[int]:
        """Return the ranks that poisons may have taken since ``began``."""
        return frozenset(rank for at, rank in self._past_poisons if at >= began) | frozenset(self._poisons.values())

    # -- callers

    async def run(self, callers: int) -> None:
        """Call until :attr:`over`; every caller finishes what it has begun."""
        timeout = aiohttp.ClientTimeout(total=_CLIENT_LIMIT)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            self._session = session
            for n in range(callers):
                group.create_task(self._caller(session, n))

    async def _caller(self, session: aiohttp.ClientSession, caller: int) -> None:
        kinds, weights = zip(*MANNERS.items(), strict=True)
        number = 0
        while not self.over:
            if self._paused:
                async with self._changed:
                    await self._changed.wait_for(lambda: not self._paused)
                continue
            # Of its own, so that how one request ends does not change the next one.
            dice = random.Random(f"{self.seed}-caller-{caller}-{number}")
            number += 1
            if not await dice.choices(kinds, weights)[0](self, session, dice):
                # Refused at once: the caller does what Retry-After and every client library do, it waits for readiness.
                await self.pod.until_ready(self)

    def request(self, dice: random.Random, **changes: object) -> Request:
        """Return the next request; ``changes`` are fields of :class:`Request`."""
        number, self.count = self.count, self.count + 1
        fields = {"stream": False, "steps": dice.randint(1, 12), **changes}
        secret = f"secret-{random.Random(f'{self.seed}-secret-{number}').getrandbits(64):016x}"
        made = Request(number=number, secret=secret, **fields)  # type: ignore[arg-type]
        self.ledger.secrets[made.secret] = f"{ID_PREFIX}{number}"
        return made

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- one request

    async def ask(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        payload: dict[str, object],
        *,
        leave_after: float | None = None,
        cancel_after: float | None = None,
        read_pause: float = 0.0,
        stuck: float = 0.0,
        headers: dict[str, str] | None = None,
        poison: int | None = None,
    ) -> bool:
        """Send it, see what comes, judge it; return whether the server took it.

        Args:
            session: of all callers.
            request: what is meant.
            payload: further fields of the body.
            leave_after: seconds after which the client goes away.
            cancel_after: seconds after which it cancels.
            read_pause: seconds between two reads.
            stuck: seconds before the first read.
            headers: further ones.
            poison: the rank that the request may take with it.
        """
        seen, number, lives = Seen(), request.number, self.pod.lives
        canceller = None
        if cancel_after is not None:
            canceller = asyncio.create_task(self._cancel(number, cancel_after))
        if poison is not None:
            self._poisons[number] = poison
        began = time.monotonic()
        text = bytearray()
        try:
            async with asyncio.timeout(leave_after) as self._running[number]:
                await self._tell()
                body = {"secret": request.secret, "steps": request.steps, **payload}
                url = self.pod.url + ("/stream" if request.stream else "/")
                named = {"X-Request-Id": f"{ID_PREFIX}{number}", **(headers or {})}
                async with session.post(url, json=body, headers=named) as answer:
                    seen.status = answer.status
                    await asyncio.sleep(stuck)  # a client that does not read, or slowly, is the workload
                    async for chunk in answer.content.iter_any():
                        text += chunk
                        await asyncio.sleep(read_pause)
        except TimeoutError:
            seen.left = request.leaves or number in self._dropped
            seen.broken = not seen.left
        except aiohttp.ClientError:
            seen.broken = True
        finally:
            del self._running[number]
            if canceller is not None:
                canceller.cancel()
        seen.seconds = time.monotonic() - began
        seen.text = text.decode(errors="replace")
        seen.left = seen.left or number in self._dropped
        seen.cancelled = number in self._cancelled
        seen.server_died = self.pod.lives != lives or self.pod.dying
        seen.hit = self.hits_since(began - _AFTERMATH)
        if poison is not None:
            del self._poisons[number]
            self._past_poisons.append((time.monotonic(), poison))
            self._hits.append((time.monotonic(), poison))
        end = self.ledger.judge(request, seen)
        await self._tell()
        return end not in ("broken", "not-ready", "draining", "queue-full")

    async def _cancel(self, number: int, after: float) -> None:
        """Cancel a request again and again, as one does who does not know whether it has arrived."""
        await asyncio.sleep(after)
        while await self.pod.post(f"/requests/{ID_PREFIX}{number}/cancel") == 404:
            await asyncio.sleep(0.02)  # not there yet


# -- manners


async def _plain(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(dice)
    return await clients.ask(session, request, {"pace": dice.choice([0, 0, 0.002])})


async def _whole_stream(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(dice, stream=True, steps=dice.choice([1, 5, 40]))
    pad = dice.choice([0, 10, 70_000])
    return await clients.ask(session, request, {"pace": dice.choice([0, 0, 0.002]), "pad": pad})


async def _leaver(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(dice, stream=dice.random() < 0.7, steps=2000, leaves=True)
    return await clients.ask(session, request, {"pace": 0.005}, leave_after=dice.random() * 0.3)


async def _slow_reader(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(dice, stream=True, steps=60)
    return await clients.ask(session, request, {"pad": 50_000}, read_pause=0.01)


async def _stuck_reader(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    # More than the server keeps for a client that does not read.
    request = clients.request(dice, stream=True, steps=400, ends=frozenset({"cancelled"}))
    return await clients.ask(session, request, {"pad": 50_000}, stuck=dice.random())


async def _canceller(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(
        dice, stream=dice.random() < 0.5, steps=4000, ends=frozenset({"cancelled"}), must_fail=True
    )
    return await clients.ask(session, request, {"pace": 0.005}, cancel_after=dice.random() * 0.2)


async def _hasty(clients: Clients, session: aiohttp.ClientSession, dice: random.Random, seconds: float = 0.1) -> bool:
    ends = frozenset({"request-timeout", "queue-timeout"})
    request = clients.request(
        dice, stream=dice.random() < 0.5, steps=10_000, ends=ends, must_fail=True, at_least=seconds
    )
    return await clients.ask(session, request, {"pace": 0.005}, headers={"X-Request-Timeout": str(seconds)})


async def _poisoner(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    act = dice.choice(ACTS)
    request = clients.request(dice, stream=dice.random() < 0.5, steps=1, ends=poison_ends())
    rank = dice.randrange(clients.pod.ranks)
    return await clients.ask(session, request, {"act": act, "rank": rank}, poison=rank)


async def _wrong(clients: Clients, session: aiohttp.ClientSession, dice: random.Random) -> bool:
    request = clients.request(dice, steps=1, ends=frozenset({"validation-error"}), must_fail=True)
    return await clients.ask(session, request, {"pace": "quickly"})


MANNERS: dict[Manner, int] = {
    _plain: 8, _whole_stream: 8, _leaver: 3, _slow_reader: 1, _stuck_reader: 1, _canceller: 3, _hasty: 2, _poisoner: 3,
    _wrong: 1,
}  # fmt: skip
