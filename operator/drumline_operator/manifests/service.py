"""The Service: it has the app's name, and leads to pods whose ranks are all ready. PURE."""

from __future__ import annotations

from typing import Any

from drumline_operator.manifests import labels
from drumline_operator.manifests.context import Context


def build(context: Context) -> dict[str, Any]:
    """Return the Service."""
    port = context.app.spec.serving.port
    ports = [{"name": "http", "port": port, "targetPort": "http", "protocol": "TCP"}]
    return context.child("Service", {"type": "ClusterIP", "selector": labels.selector(context.name), "ports": ports})


def url(context: Context) -> str:
    """Return the app's address inside the cluster."""
    host = f"{context.name}.{context.app.metadata.namespace}.svc.{context.settings.cluster_domain}"
    return f"http://{host}:{context.app.spec.serving.port}"
