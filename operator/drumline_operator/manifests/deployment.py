"""The Deployment that keeps an app's pods. PURE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from drumline.api.v1alpha1 import DistributedAppSpec
from drumline_operator.manifests import labels, pod
from drumline_operator.manifests.context import Context
from drumline_operator.manifests.names import INPUTS, RENDERED_BY, TEMPLATE


def build(context: Context, live: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the Deployment.

    Args:
        context: the app.
        live: the Deployment that exists. Its pods keep the template that they were made from until what the pods are
            made from changes: a new version of the operator, which may build other pods, restarts nothing.

    Raises:
        ConfigurationError: as :func:`drumline_operator.manifests.pod.build`.
    """
    inputs = context.inputs
    kept = _kept(live, inputs)
    if kept is not None:
        return _around(context, inputs, *kept)
    template = pod.build(context)
    text = json.dumps(template, sort_keys=True, separators=(",", ":"))
    return _around(context, inputs, template, text, context.settings.version)


def with_the_same_pods(context: Context, live: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the Deployment with the pods that it has, for an app whose new pods cannot be built now.

    Returns:
        None when the live one does not tell any more what its pods were made from.
    """
    inputs = str(((live.get("metadata") or {}).get("annotations") or {}).get(INPUTS, "")).partition(".")[0]
    kept = _kept(live, inputs)
    return None if kept is None else _around(context, inputs, *kept)


def _around(context: Context, inputs: str, template: dict[str, Any], text: str, rendered_by: str) -> dict[str, Any]:
    """``text``: ``template`` as it is kept beside it."""
    spec = context.app.spec
    annotations = {INPUTS: f"{inputs}.{_digest(text)}", RENDERED_BY: rendered_by, TEMPLATE: text}
    body = {
        "replicas": 0 if spec.suspend else spec.replicas,
        "selector": {"matchLabels": labels.selector(context.name)},
        "strategy": strategy(spec),
        "progressDeadlineSeconds": spec.rollout.progress_deadline_seconds,
        "revisionHistoryLimit": 2,
        "template": template,
    }
    return context.child("Deployment", body, annotations)


def strategy(spec: DistributedAppSpec) -> dict[str, Any]:
    """Return how pods are replaced.

    With GPUs there is no room for one pod more, so one is stopped before its successor starts; Kubernetes' own default
    would wait for ever for a free GPU. CPU apps start the new pod first.
    """
    rollout = spec.rollout
    if rollout.type == "Recreate":
        return {"type": "Recreate"}
    surge, missing = rollout.max_surge, rollout.max_unavailable
    if surge is None and missing is None:
        surge, missing = (0, 1) if spec.num_gpus else (1, 0)
    elif surge is None:
        surge = 1 if missing in {0, "0%"} else 0
    elif missing is None:
        missing = 1 if surge in {0, "0%"} else 0
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": missing}}


def _kept(live: Mapping[str, Any] | None, inputs: str) -> tuple[dict[str, Any], str, str] | None:
    """The template (also as text) that the live Deployment was made from, when it was made from the same and is unharmed."""
    annotations = ((live or {}).get("metadata") or {}).get("annotations") or {}
    text = annotations.get(TEMPLATE, "")
    if annotations.get(INPUTS) != f"{inputs}.{_digest(text)}":
        return None
    template: dict[str, Any] = json.loads(text)
    return template, text, annotations.get(RENDERED_BY, "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
