"""An App as a service: its endpoints as a FastAPI router, its ``setup()`` and ``teardown()`` as start and stop."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from drumline import app as apps
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError
from drumline.server.service import Service

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


def app_service(app: apps.App, settings: RunnerSettings, *, title: str = "", description: str = "") -> Service:
    """Return the service of an App: its ``setup()`` and ``teardown()``, its endpoints, the runners that it starts.

    Args:
        app: the App, not set up.
        settings: of the container; they also hold for runners that the App starts.
        title: shown in OpenAPI; default: the app's id.
        description: shown in OpenAPI; default: the class's docstring.

    Raises:
        ConfigurationError: an endpoint's path or signature cannot be served.
    """

    async def start() -> None:
        await apps.open_app(app, settings)

    async def stop() -> None:
        await apps.close_app(app)

    own = type(app).__doc__ if type(app).__doc__ != apps.App.__doc__ else None
    return Service(
        settings,
        start=start,
        stop=stop,
        leave=app.handle_exit,
        router=build_router(app),
        title=title,
        description=description or inspect.cleandoc(own or ""),
    )
