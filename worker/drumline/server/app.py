"""Wiring: a service and settings become one ASGI application."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fastapi import FastAPI

from drumline.contract import RunnerSettings
from drumline.server.control import add_handlers, control_router
from drumline.server.edge import Edge
from drumline.server.metrics import Metrics
from drumline.server.openapi import document
from drumline.server.service import Service


def create_app(service: Service, settings: RunnerSettings | None = None) -> Edge:
    """Return the ASGI application that serves ``service``; see ``drumline.server.serve`` for its life.

    Args:
        service: what is served.
        settings: of the container; default: the service's own.
    """
    settings = settings or service.settings
    metrics = Metrics(lambda: [runner.status for runner in service.runners()])
    service.observers.append(metrics)
    inner = FastAPI(
        title=service.title, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, debug=False
    )

    def openapi() -> dict[str, Any]:
        return document(inner, service, metadata.version("drumline"))

    if service.router is not None:
        inner.include_router(service.router)
    inner.include_router(control_router(service, metrics, openapi))
    add_handlers(inner, settings.debug)
    inner.openapi = openapi  # type: ignore[method-assign]
    edge = Edge(service, settings, inner, metrics)
    service.runners()  # is watched from here on, before it starts
    return edge
