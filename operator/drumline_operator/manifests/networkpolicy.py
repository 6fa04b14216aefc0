"""The NetworkPolicy of ``networkPolicy: DenyAllIngress``. PURE."""

from __future__ import annotations

from typing import Any

from drumline_operator.manifests import labels
from drumline_operator.manifests.context import Context


def build(context: Context) -> dict[str, Any] | None:
    """Return the policy, or None when the app wants none.

    Only connections to the app are judged: what its pods reach (DNS, model hubs) stays open. The kubelet's probes are
    always let through.
    """
    if context.app.spec.network_policy == "Disabled":
        return None
    client = {"matchLabels": {labels.CLIENT: "true"}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": context.settings.namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": labels.OPERATOR}},
    }
    body = {
        "podSelector": {"matchLabels": labels.selector(context.name)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": client}, {"namespaceSelector": client}, operator],
                "ports": [{"port": "http", "protocol": "TCP"}],
            }
        ],
    }
    return context.child("NetworkPolicy", body)
