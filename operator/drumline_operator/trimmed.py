"""Objects of the API server -> the few bytes of them that are kept. PURE.

A thousand Deployments as dictionaries take 60 MB, as trimmed JSON 5 MB; they are decoded when somebody looks at them.
Only what is compared, judged or shown is kept, so that nothing else counts as a change.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from drumline.api.v1alpha1 import API_VERSION
from drumline_operator.manifests.labels import APP
from drumline_operator.manifests.names import API_VERSIONS


class _Struct(Struct, omit_defaults=True):
    """Whatever a class does not name is dropped."""


class _Name(_Struct):
    name: str
    namespace: str | UnsetType = UNSET
    uid: str | UnsetType = UNSET
    resourceVersion: str | UnsetType = UNSET  # noqa: N815 - the API's own name


class _Meta(_Name):
    generation: int | UnsetType = UNSET
    creationTimestamp: str | UnsetType | None = UNSET  # noqa: N815
    deletionTimestamp: str | UnsetType | None = UNSET  # noqa: N815
    labels: dict[str, str] | UnsetType | None = UNSET
    annotations: dict[str, str] | UnsetType | None = UNSET
    ownerReferences: Raw | UnsetType = UNSET  # noqa: N815


class _PodMeta(_Name):
    creationTimestamp: str | UnsetType | None = UNSET  # noqa: N815
    deletionTimestamp: str | UnsetType | None = UNSET  # noqa: N815
    labels: dict[str, str] | UnsetType | None = UNSET


class _NodeMeta(_Name):
    labels: dict[str, str] | UnsetType | None = UNSET


class _Condition(_Struct):
    type: str
    status: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    message: str | UnsetType = UNSET


class _NodeCondition(_Struct):
    type: str
    status: str | UnsetType = UNSET


class _Port(_Struct):
    name: str = ""
    containerPort: int = 0  # noqa: N815


class _Container(_Struct):
    name: str
    ports: list[_Port] | UnsetType | None = UNSET


class _PodSpec(_Struct):
    nodeName: str | UnsetType = UNSET  # noqa: N815
    containers: list[_Container] = []


class _ContainerStatus(_Struct):
    name: str
    ready: bool = False
    restartCount: int = 0  # noqa: N815
    state: Raw | UnsetType = UNSET
    lastState: Raw | UnsetType = UNSET  # noqa: N815


class _PodStatus(_Struct):
    phase: str | UnsetType = UNSET
    podIP: str | UnsetType = UNSET  # noqa: N815
    reason: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    conditions: list[_Condition] | UnsetType | None = UNSET
    initContainerStatuses: list[_ContainerStatus] | UnsetType | None = UNSET  # noqa: N815
    containerStatuses: list[_ContainerStatus] | UnsetType | None = UNSET  # noqa: N815


class _DeploymentStatus(_Struct):
    observedGeneration: int | UnsetType = UNSET  # noqa: N815
    conditions: list[_Condition] | UnsetType | None = UNSET


class _NodeSpec(_Struct):
    unschedulable: bool = False


class _NodeStatus(_Struct):
    allocatable: Raw | UnsetType = UNSET
    conditions: list[_NodeCondition] | UnsetType | None = UNSET


class _Object(_Struct):
    metadata: _Meta
    spec: Raw | UnsetType = UNSET


class _Custom(_Object):
    status: Raw | UnsetType = UNSET


class _Deployment(_Object):
    status: _DeploymentStatus | UnsetType = UNSET


class _Pod(_Struct):
    metadata: _PodMeta
    spec: _PodSpec | UnsetType = UNSET
    status: _PodStatus | UnsetType = UNSET


class _Node(_Struct):
    metadata: _NodeMeta
    spec: _NodeSpec | UnsetType = UNSET
    status: _NodeStatus | UnsetType = UNSET


class _ConfigMap(_Struct):
    metadata: _Name
    data: Raw | UnsetType = UNSET
    binaryData: Raw | UnsetType = UNSET  # noqa: N815


_SHAPES: Final[dict[str, Any]] = {
    "DistributedApp": _Custom,
    "MachineType": _Custom,
    "Deployment": _Deployment,
    "Service": _Object,
    "PodDisruptionBudget": _Object,
    "NetworkPolicy": _Object,
    "Pod": _Pod,
    "Node": _Node,
    "ConfigMap": _ConfigMap,
}
_DECODERS: Final = {kind: msgspec.json.Decoder(shape) for kind, shape in _SHAPES.items()}
_VERSIONS: Final = {"DistributedApp": API_VERSION, "MachineType": API_VERSION, **API_VERSIONS}
#: A copy of the whole object, by kubectl; and the number that a Deployment's controller gives to what it has just seen.
_LEFT_OUT: Final = ("kubectl.kubernetes.io/last-applied-configuration", "deployment.kubernetes.io/revision")
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Kept(Struct, frozen=True):
    """What is kept of an object.

    Attributes:
        name: the object's.
        namespace: empty for kinds without one.
        uid: the object's.
        version: its resourceVersion, which grows with every write.
        app: the app that its labels name, or empty.
        data: the trimmed object as JSON, without its resourceVersion.
    """

    name: str
    namespace: str
    uid: str
    version: int
    app: str
    data: bytes


def keep(kind: str, text: bytes | Raw) -> Kept:
    """Return what is kept of an object.

    Raises:
        ValueError: ``text`` is no such object.
    """
    found = _DECODERS[kind].decode(text)
    meta = found.metadata
    version, meta.resourceVersion = meta.resourceVersion, UNSET
    if kind == "Deployment":
        _leave_troubles(found)
    labels = getattr(meta, "labels", None) or {}
    if annotations := getattr(meta, "annotations", None):
        for each in _LEFT_OUT:
            annotations.pop(each, None)
    return Kept(
        name=meta.name,
        namespace=meta.namespace if meta.namespace is not UNSET else "",
        uid=meta.uid or "",
        version=int(version or 0),
        app=labels.get(APP, ""),
        data=_encode(found),
    )


def _leave_troubles(found: _Deployment) -> None:
    """How far a rollout is, its pods tell; the Deployment's status changes with each step, and says more only of trouble."""
    if not found.status:
        return
    wrong = [
        each
        for each in found.status.conditions or ()
        if (each.type, each.status) == ("ReplicaFailure", "True")
        or (each.type, each.status) == ("Progressing", "False")
    ]
    found.status.conditions = wrong
    if not wrong:
        found.status = UNSET


def whole(kind: str, kept: Kept) -> dict[str, Any]:
    """Return the trimmed object as the API server would give it."""
    found: dict[str, Any] = _decode(kept.data)
    found["metadata"]["resourceVersion"] = str(kept.version)
    return {"apiVersion": _VERSIONS.get(kind, "v1"), "kind": kind, **found}
