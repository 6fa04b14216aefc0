"""Clients: each sends one request after another, in every manner that clients have, and judges what comes back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from chaos.model import Ledger, Request, Seen, poison_ends
from chaos.supervisor import Pod
from drumline.testing.poison import DEEDS, RAISES, RESULTS

#: Far above what any request may take: the model has the limits.
_CLIENT_LIMIT = 90.0
_LIMIT = 60.0


@dataclass
class Clients:
    """A number of callers that go on until they are told to stop.

    Attributes:
        pod: who is asked.
        ledger: where the verdicts go.
        seed: of all random choices; caller ``n`` has a stream of its own.
    """

    pod: Pod
    ledger: Ledger
    seed: int
    count: int = 0
    over: bool = False
    begun: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, count: int) -> None:
        """Wait until ``count`` requests have begun."""
        async with self.begun:
            await self.begun.wait_for(lambda: self.count >= count)

    async def run(self, callers: int) -> None:
        """Call until :attr:`over`; every caller finishes what it has begun."""
        timeout = aiohttp.ClientTimeout(total=_CLIENT_LIMIT)
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            for n in range(callers):
                group.create_task(self._caller(session, random.Random(f"{self.seed}-{n}")))

    async def _caller(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        manners: list[tuple[Callable[[aiohttp.ClientSession, random.Random], Awaitable[bool]], int]] = [
            (self._plain, 8), (self._whole_stream, 8), (self._leaver, 3), (self._slow_reader, 1), (self._canceller, 3),
            (self._hasty, 2), (self._poisoner, 3), (self._wrong, 1),
        ]  # fmt: skip
        kinds, weights = zip(*manners, strict=True)
        while not self.over:
            if not await dice.choices(kinds, weights)[0](session, dice):
                # Refused at once: the caller does what Retry-After and every client library do, it waits for readiness.
                await self.pod.until_ready(self)

    def _request(self, dice: random.Random, **changes: object) -> Request:
        number, self.count = self.count, self.count + 1
        fields = {"stream": False, "steps": dice.randint(1, 12), "limit": _LIMIT, **changes}
        return Request(number=number, secret=f"secret-{dice.getrandbits(64):016x}", **fields)  # type: ignore[arg-type]

    # -- manners

    async def _plain(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(dice)
        return await self._ask(session, request, {"pace": dice.choice([0, 0, 0.002])})

    async def _whole_stream(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(dice, stream=True, steps=dice.choice([1, 5, 40]))
        return await self._ask(
            session, request, {"pace": dice.choice([0, 0, 0.002]), "pad": dice.choice([0, 10, 70_000])}
        )

    async def _leaver(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(dice, stream=dice.random() < 0.7, steps=2000, leaves=True)
        return await self._ask(session, request, {"pace": 0.005}, leave_after=dice.random() * 0.3)

    async def _slow_reader(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(dice, stream=True, steps=60)
        return await self._ask(session, request, {"pad": 50_000}, read_pause=0.01)

    async def _canceller(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(
            dice, stream=dice.random() < 0.5, steps=4000, ends=frozenset({"cancelled"}), must_fail=True
        )
        return await self._ask(session, request, {"pace": 0.005}, cancel_after=dice.random() * 0.2)

    async def _hasty(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        ends = frozenset({"request-timeout"})
        request = self._request(dice, stream=dice.random() < 0.5, steps=4000, ends=ends, must_fail=True)
        return await self._ask(session, request, {"pace": 0.005}, headers={"X-Request-Timeout": "0.1"})

    async def _poisoner(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        act = dice.choice(sorted([*RESULTS, *RAISES, *DEEDS]))
        request = self._request(dice, stream=dice.random() < 0.5, steps=1, ends=poison_ends())
        return await self._ask(session, request, {"act": act, "rank": dice.randrange(self.pod.ranks)})

    async def _wrong(self, session: aiohttp.ClientSession, dice: random.Random) -> bool:
        request = self._request(dice, steps=1, ends=frozenset({"validation-error"}), must_fail=True)
        return await self._ask(session, request, {"pace": "quickly"})

    # -- one request

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        payload: dict[str, object],
        *,
        leave_after: float | None = None,
        cancel_after: float | None = None,
        read_pause: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> bool:
        """Send it, see what comes, judge it; return whether the server took it."""
        seen, lives = Seen(), self.pod.lives
        async with self.begun:
            self.begun.notify_all()
        url = self.pod.url + ("/stream" if request.stream else "/")
        name = f"chaos-{request.number}"
        body = {"secret": request.secret, "steps": request.steps, **payload}
        canceller = None
        if cancel_after is not None:
            canceller = asyncio.create_task(self._cancel(session, name, cancel_after))
        started = time.monotonic()
        try:
            async with asyncio.timeout(leave_after):
                async with session.post(url, json=body, headers={"X-Request-Id": name, **(headers or {})}) as answer:
                    seen.status = answer.status
                    async for chunk in answer.content.iter_any():
                        seen.text += chunk.decode()
                        if read_pause:
                            await asyncio.sleep(read_pause)  # a slow client is the workload
        except TimeoutError:
            seen.broken = leave_after is None
        except aiohttp.ClientError:
            seen.broken = True
        finally:
            if canceller is not None:
                canceller.cancel()
        seen.seconds = time.monotonic() - started
        seen.server_died = self.pod.lives != lives or self.pod.dying
        end = self.ledger.judge(request, seen)
        return end not in ("broken", "not-ready", "draining", "queue-full")

    async def _cancel(self, session: aiohttp.ClientSession, name: str, after: float) -> None:
        """Cancel a request again and again, as one does who does not know whether it has arrived."""
        await asyncio.sleep(after)
        while True:
            try:
                async with session.post(f"{self.pod.url}/requests/{name}/cancel") as answer:
                    if answer.status == 202:
                        return
            except aiohttp.ClientError:
                return
            await asyncio.sleep(0.02)  # not there yet
