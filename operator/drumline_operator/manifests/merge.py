"""Kubernetes' strategic merge for pods: objects field by field, lists of named things by their key. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

#: Lists of a pod that are merged item by item, and by what; every other list is replaced.
MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``patch`` over it; None removes a field. Neither is changed."""
    result = dict(base)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        elif key in MERGE_KEYS and isinstance(value, list) and isinstance(result.get(key), list):
            result[key] = by_key(result[key], value, MERGE_KEYS[key])
        else:
            result[key] = value
    return result


def by_key(base: Sequence[Any], patch: Sequence[Any], key: str) -> list[Any]:
    """Return the items of ``base``, each merged with the one of ``patch`` that has the same ``key``, then the rest."""
    result = list(base)
    places = {item.get(key): index for index, item in enumerate(base)}
    for item in patch:
        place = places.get(item.get(key)) if isinstance(item, Mapping) else None
        if place is None:
            result.append(item)
        elif key == "name" and {"value", "valueFrom"} & set(item):
            result[place] = dict(item)  # an environment variable: a value and a valueFrom do not mix
        else:
            result[place] = merge(result[place], item)
    return result
