"""The first difference between what is wanted and what is there, in words. PURE.

Only what is wanted is compared: the API server adds defaults, and other field managers may own more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from drumline_operator import quantity
from drumline_operator.manifests.names import INPUTS, RENDERED_BY, TEMPLATE

_KEYS: Final = ("name", "mountPath", "containerPort", "port", "uid")
_QUANTITIES: Final = {"limits", "requests", "sizeLimit"}
_LONGEST: Final = 80
_IGNORED: Final = {"apiVersion", "kind", "status"}
#: Pairs without a difference, by their digests, the oldest first: a run compares the same ones as the run before it, and to
#: walk through a Deployment takes five times as long as its digest.
_alike: Final[dict[bytes, None]] = {}
_MOST_ALIKE: Final = 10_000
_encode: Final = msgspec.json.Encoder().encode
#: Fields of a pod template and of its owners that the API server leaves out when they are false or 0: for it that is the
#: same as not given. Of every other one (``automountServiceAccountToken``) a false that is missing is a difference.
_OMITTED: Final = {
    "chapAuthDiscovery", "chapAuthSession", "hostIPC", "hostNetwork", "hostPID", "paused", "publishNotReadyAddresses",
    "readOnly", "sslEnabled", "stdin", "stdinOnce", "tty", "failureThreshold", "healthCheckNodePort", "hostPort",
    "initialDelaySeconds", "minReadySeconds", "nodePort", "partition", "periodSeconds", "successThreshold",
    "timeoutSeconds",
}  # fmt: skip
#: The same for maps; any other ``{}`` is a structure that means something (``emptyDir``).
_MAPS: Final = {
    "annotations", "labels", "limits", "matchLabels", "nodeSelector", "options", "overhead", "requests", "selector",
    "userAnnotations", "volumeAttributes",
}  # fmt: skip
#: What only follows from another change is named when there is no other.
_FOLLOWS: Final = (*(f"annotations.{name}" for name in (INPUTS, RENDERED_BY, TEMPLATE)), "[DRUMLINE_REVISION].value")


def first_difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return e.g. ``spec.template.spec.containers[worker].image: 'a:1' -> 'a:2'``, or None when all is as wanted."""
    pair = _digest(wanted, found)
    if pair in _alike:
        return None
    differences = [
        (place, words)
        for key in sorted(wanted, key=lambda key: (key != "spec", key))
        if key not in _IGNORED
        for place, words in _differences(wanted[key], found.get(key), key)
    ]
    if not differences:
        if len(_alike) >= _MOST_ALIKE:
            del _alike[next(iter(_alike))]
        _alike[pair] = None
    causes = [words for place, words in differences if not place.endswith(_FOLLOWS)]
    return next(iter([*causes, *(words for _, words in differences)]), None)


def _digest(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bytes:
    """Return a digest of all that a comparison looks at: not of the version, which every write to the object changes."""
    there = {key: found.get(key) for key in wanted if key not in _IGNORED}
    asked, given = wanted.get("metadata"), there.get("metadata")
    if isinstance(asked, Mapping) and isinstance(given, Mapping):
        there["metadata"] = {key: given.get(key) for key in asked}
    return hashlib.blake2b(_encode([wanted, there]), digest_size=16).digest()


def _differences(wanted: Any, found: Any, place: str) -> Iterator[tuple[str, str]]:
    if found is None and _left_out(wanted, place.rpartition(".")[2]):
        return
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted(wanted, key=lambda key: (key == "metadata", key)):
            yield from _differences(wanted[key], found.get(key), f"{place}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list):
        yield from _differences_of_lists(wanted, found, place)
    elif not _same(wanted, found, place):
        yield place, f"{place}: {_short(found)} -> {_short(wanted)}"


def _left_out(wanted: Any, field: str) -> bool:
    """Whether the API server keeps nothing of such a value."""
    if wanted in ("", []) or wanted is None:
        return True
    return field in (_MAPS if isinstance(wanted, Mapping) else _OMITTED) and not wanted


def _same(wanted: Any, found: Any, place: str) -> bool:
    if wanted == found:
        return isinstance(wanted, bool) == isinstance(found, bool)
    return bool(_QUANTITIES & set(place.split("."))) and quantity.same(wanted, found)


def _differences_of_lists(wanted: Sequence[Any], found: Sequence[Any], place: str) -> Iterator[tuple[str, str]]:
    key = next((key for key in _KEYS if all(isinstance(item, Mapping) and key in item for item in wanted)), None)
    if key is None:
        if len(wanted) != len(found):
            yield place, f"{place}: {_short(found)} -> {_short(wanted)}"
            return
        for index, item in enumerate(wanted):
            yield from _differences(item, found[index], f"{place}[{index}]")
        return
    there = {item.get(key): item for item in found if isinstance(item, Mapping)}
    for item in wanted:
        if item[key] in there:
            yield from _differences(item, there[item[key]], f"{place}[{item[key]}]")
        else:
            yield f"{place}[{item[key]}]", f"{place}[{item[key]}]: missing"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
