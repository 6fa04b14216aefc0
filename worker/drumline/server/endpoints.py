"""The endpoints of an App as a FastAPI router."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from drumline import app as apps
from drumline.errors import ConfigurationError

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
