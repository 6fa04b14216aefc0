"""Children that no write can make right: what is wrong with them never changes while they live. PURE.

Such a child is not as the operator makes it now: somebody deleted it and made it again (``kubectl replace --force``), or an
older operator made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_HEADLESS: Final = "None"


def why(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return what can only be changed by making the child anew, in words, or None.

    A Deployment's selector never changes. A Service without an address of its own never gets one; its port numbers would
    mean nothing, because its name leads straight to the pods.
    """
    ours, theirs = wanted["spec"], found.get("spec") or {}
    if wanted["kind"] == "Deployment" and theirs.get("selector") != ours["selector"]:
        return f"spec.selector is {theirs.get('selector')}, and a selector never changes"
    if wanted["kind"] == "Service" and theirs.get("clusterIP") == _HEADLESS:
        return "spec.clusterIP is None, and a Service without an address never gets one"
    return None


def keeps_pods(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether the pods of a Deployment go on when it is made anew: the new one takes over those that have its labels.

    Then a rollout replaces them one by one. Others would belong to nobody, for ever, and the Service leads to none of them.
    """
    if wanted["kind"] != "Deployment":
        return False
    template = (found.get("spec") or {}).get("template") or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    ours: Mapping[str, str] = wanted["spec"]["selector"]["matchLabels"]
    return labels.items() >= ours.items()
