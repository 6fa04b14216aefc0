"""An App as a service: its endpoints as a FastAPI router, its ``setup()`` and ``teardown()`` as start and stop."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from drumline import app as apps
from drumline import logs
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError
from drumline.server.serve import run
from drumline.server.service import Service

log = logging.getLogger("drumline.server")

HINT_HEADERS = ("X-Drumline-Hints", "X-Fal-Runner-Hints")


def build_router(app: apps.App) -> APIRouter:
    """Return a router with one POST route per endpoint of ``app``; handlers are its bound methods.

    Raises:
        ConfigurationError: a path is taken twice or belongs to the server, or a method's annotations are no endpoint's.
    """

    class EndpointRoute(APIRoute):
        """Adds the app's hints to what the endpoint answers."""

        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            answer = super().get_route_handler()

            async def with_hints(request: Request) -> Response:
                response: Response = await answer(request)
                words = apps.hints(app)
                if words is not None:
                    for header in HINT_HEADERS:
                        response.headers[header] = words
                return response

            return with_hints

    router = APIRouter(route_class=EndpointRoute)
    for endpoint in apps.endpoints(type(app)):
        handler: Any = getattr(app, endpoint.method)
        try:
            router.add_api_route(endpoint.path, handler, methods=["POST"], name=endpoint.method)
        except Exception as error:
            raise ConfigurationError(f"{type(app).__name__}.{endpoint.method}: {error}") from error
    return router


def app_service(cls: type[apps.App], settings: RunnerSettings) -> Service:
    """Return the service of an App: its endpoints, and its ``setup()`` and ``teardown()`` as start and stop.

    Args:
        cls: the App; it is instantiated.
        settings: of the container.

    Raises:
        ConfigurationError: an endpoint is wrong.
    """
    apps.endpoints(cls)
    app = cls()

    async def start() -> None:
        await apps.open_app(app, settings)

    async def stop() -> None:
        await apps.close_app(app)

    return Service(
        settings,
        start=start,
        stop=stop,
        leave=app.handle_exit,
        router=build_router(app),
        title=cls.app_name or cls.__name__,
        description=inspect.cleandoc(cls.__doc__ or ""),
    )


def serve_in_foreground(cls: type[apps.App]) -> None:
    """Serve an App with settings from the environment until a signal; see :func:`drumline.app.wrap_app`."""
    try:
        settings = RunnerSettings.from_env(os.environ, name=cls.app_name, any_id=True)
        logs.configure(settings.log_format, settings.log_level)
        ended = run(
            app_service(cls, settings),
            on_bound=lambda url: log.info("%s is starting; %s/docs", cls.__name__, url),
            on_ready=lambda: log.info("%s is ready: %s", cls.__name__, ", ".join(e.path for e in apps.endpoints(cls))),
        )
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    if ended.error is not None or ended.forced:
        raise SystemExit(1)
