"""Asks runners in pods over HTTP what state their ranks are in."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

#: Seconds for an answer that is there already, and for a connection.
_SOON: Final = 2.0
#: Longer than a runner waits for news.
_LONG: Final = 40.0


class RunnerClient:
    """One HTTP session for all runners; to be entered with ``async with``."""

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    async def runner_news(self, address: str, port: int, since: int | None) -> Mapping[str, Any] | None:
        """Return a runner's status as soon as its version is not ``since``, or None when it does not answer.

        Args:
            address: of the pod.
            port: of the runner.
            since: a version that is known; None: answer at once.
        """
        host = f"[{address}]" if ":" in address else address
        query = "" if since is None else f"?since={since}"
        limits = aiohttp.ClientTimeout(total=_SOON if since is None else _LONG, sock_connect=_SOON)
        try:
            # Open without a key, also where the app asks for keys; 503 has the same body as 200.
            async with self._http.get(f"http://{host}:{port}/readyz{query}", timeout=limits) as answer:
                body = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        return body if isinstance(body, dict) else None
