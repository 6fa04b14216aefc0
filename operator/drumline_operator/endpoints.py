"""The operator's own HTTP port: whether it lives, whether it has seen the cluster, and its metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from drumline.errors import ConfigurationError

#: Seconds that open answers get when the operator ends.
_GRACE = 0.5


@dataclass(frozen=True)
class Health:
    """What the probes ask; each returns what is wrong, or nothing."""

    alive: Callable[[], list[str]]
    ready: Callable[[], list[str]]


@asynccontextmanager
async def serving(address: tuple[str | None, int], health: Health, registry: CollectorRegistry) -> AsyncIterator[int]:
    """Serve ``/healthz``, ``/readyz`` and ``/metrics``; yields the port.

    Raises:
        ConfigurationError: the address cannot be used.
    """

    def probe(ask: Callable[[], list[str]]) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            wrong = ask()
            return web.json_response({"status": "; ".join(wrong) or "ok"}, status=503 if wrong else 200)

        return answer

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", probe(health.alive)),  # type: ignore[arg-type] # it is a handler
            web.get("/readyz", probe(health.ready)),  # type: ignore[arg-type]
            web.get("/metrics", metrics),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_GRACE, handle_signals=False)
    await runner.setup()
    host, port = address
    site = web.TCPSite(runner, host, port)
    try:
        try:
            await site.start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host or '*'}:{port}: {error.strerror}; set DRUMLINE_OPERATOR_BIND"
            ) from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
