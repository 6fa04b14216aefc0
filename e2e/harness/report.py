"""What a failed scenario leaves in its report: objects, events and logs, read before its namespace goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from e2e.cluster.errors import ClusterError
from e2e.harness.kube import Kube
from e2e.harness.operator import Operator

_KINDS: Final = "dapp,deployment,replicaset,pod,service,endpointslices,pdb"
#: Characters of one section: its end, where the news is.
_LONGEST: Final = 20_000
#: Whose logs are read, the newest: a ReplicaSet whose pods a node refuses makes thousands.
_PODS: Final = 12


def sections(kube: Kube, operator: Operator | None) -> Iterator[tuple[str, str]]:
    """Titles and texts. What cannot be had is said, and stops nothing."""
    yield "objects", _said(lambda: kube("get", _KINDS, "--output=wide"))
    yield "apps", _said(lambda: kube("get", "dapp", "--output=yaml"))
    yield "pods", _said(lambda: kube("describe", "pods"))
    yield "events", _said(lambda: kube("get", "events", "--sort-by=.metadata.creationTimestamp"))
    names = _said(lambda: kube("get", "pods", "--output=name", "--sort-by=.metadata.creationTimestamp")).split()
    pods = [name for name in names if name.startswith("pod/")]
    for name in pods[-_PODS:]:
        yield f"logs of {name}", _logs(kube, name)
    yield "nodes", _said(lambda: kube("get", "nodes", "--output=wide"))
    if operator is not None:
        yield "logs of the operator", _said(operator.logs)


def _logs(kube: Kube, pod: str) -> str:
    options = (pod, "--all-containers", "--tail=80", "--prefix")
    now = _said(lambda: kube("logs", *options))
    try:
        return f"{kube('logs', *options, '--previous')}\n--- since its last restart:\n{now}"
    except ClusterError:
        return now  # it has never restarted


def _said(ask: Callable[[], str]) -> str:
    try:
        return ask()[-_LONGEST:]
    except ClusterError as error:
        return f"not to be had: {error}"
