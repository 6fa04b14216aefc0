"""The PodDisruptionBudget: a drain of nodes takes one pod at a time. PURE."""

from __future__ import annotations

from typing import Any

from drumline_operator.manifests import labels
from drumline_operator.manifests.context import Context


def build(context: Context) -> dict[str, Any]:
    """Return the budget. A pod that is not ready serves nobody and never holds up a drain."""
    body = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": labels.selector(context.name)},
    }
    return context.child("PodDisruptionBudget", body)
