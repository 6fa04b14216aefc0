"""Node objects: what they say, and waiting until they say it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .api import Api
from .errors import ClusterError
from .layout import GPU_RESOURCE

#: Seconds after which a watch is begun anew, to look after processes that have died meanwhile.
WATCH_SECONDS = 2


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether it is Ready."""
    conditions = node.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def is_usable(node: Mapping[str, Any]) -> bool:
    """Whether it is Ready and has no taints left."""
    return is_ready(node) and not node["spec"].get("taints")


def state(node: Mapping[str, Any]) -> str:
    """In words: `Ready`, or what keeps pods away."""
    if not is_ready(node):
        said = [each for each in node.get("status", {}).get("conditions", []) if each["type"] == "Ready"]
        return " ".join(["NotReady", *(f"({each.get('reason')}: {each.get('message')})" for each in said)])
    taints = [f"{taint['key']}:{taint['effect']}" for taint in node["spec"].get("taints", [])]
    return f"Ready, tainted {', '.join(taints)}" if taints else "Ready"


def gpus_of(node: Mapping[str, Any]) -> int:
    """The GPUs that pods can have on it."""
    return int(node.get("status", {}).get("allocatable", {}).get(GPU_RESOURCE, 0))


def wait(
    api: Api,
    done: Callable[[str, Mapping[str, Any] | None], bool],
    *,
    limit: float,
    check: Callable[[], None],
    explain: Callable[[], str] = str,
    selector: str = "",
) -> None:
    """Follow the nodes until `done`.

    Args:
        api: The API server.
        done: Told the name and the object of each node, first all that are there, then each that changes; None when it is
            gone. Whether that is what was waited for. The same may be told again.
        limit: Seconds.
        check: Called now and then; what it raises ends the wait.
        explain: More for the message when the time is over.
        selector: Of labels, as it stands in a URL.

    Raises:
        ClusterError: The time is over.
    """
    deadline = time.monotonic() + limit
    path = "/api/v1/nodes" + (f"?labelSelector={selector}" if selector else "")
    while True:
        for name, item in api.follow(path, WATCH_SECONDS):
            if done(name, item):
                return
        check()
        if time.monotonic() > deadline:
            raise ClusterError(f"the nodes did not get ready in {limit:.0f} s\n{explain()}".rstrip())
