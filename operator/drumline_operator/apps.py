"""What of an app decides which changes elsewhere concern it. PURE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Struct

from drumline_operator import reasons
from drumline_operator.machine_types import MACHINE_TYPE_PREFIX
from drumline_operator.store import Change, Store
from drumline_operator.trimmed import Kept

#: Nodes change one after the other; those who wait for them are told once.
NODES_SETTLE: Final = 1.0
#: A pod that starts changes several times in a moment; only the status tells of that, and not of each step.
PROGRESS_SETTLES: Final = 0.5


class _Condition(Struct, frozen=True):
    type: str
    status: str = ""
    reason: str = ""


class _Named(Struct, frozen=True):
    name: str = ""


class _Source(Struct, frozen=True):
    configMap: _Named | None = None  # noqa: N815 - the API's own names


class _Spec(Struct, frozen=True):
    machineType: str | None = None  # noqa: N815
    aliases: tuple[str, ...] = ()
    source: _Source | None = None


class _Status(Struct, frozen=True):
    conditions: tuple[_Condition, ...] | None = None


class _App(Struct, frozen=True):
    spec: _Spec = _Spec()
    status: _Status = _Status()


class _Meta(Struct, frozen=True):
    deletionTimestamp: str | None = None  # noqa: N815


class _Pod(Struct, frozen=True):
    metadata: _Meta = _Meta()
    status: _Status = _Status()

    @property
    def verdict(self) -> tuple[object, ...]:
        """What is told at once: its end, and whether it is ready."""
        ready = any((each.type, each.status) == ("Ready", "True") for each in self.status.conditions or ())
        return bool(self.metadata.deletionTimestamp), ready


_decode: Final = msgspec.json.Decoder(_App).decode
_pod: Final = msgspec.json.Decoder(_Pod).decode


class Facts(Struct, frozen=True):
    """About one app. ``key``: ``namespace/name``; ``conditions``: type, status and reason of each."""

    key: str
    namespace: str
    machine_type: str
    config_map: str
    conditions: tuple[tuple[str, str, str], ...]

    @property
    def waits_for_machine(self) -> bool:
        """Whether another node or MachineType may help it."""
        return any(type in {"Ready", "Scheduled"} and status != "True" for type, status, _ in self.conditions)

    @property
    def has_no_machine(self) -> bool:
        """Whether the MachineType that it names is not known, or ambiguous."""
        return any(reason == reasons.NO_MACHINE for _, _, reason in self.conditions)


class Apps:
    """Facts about all apps of a store; computed anew only for those that have changed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[int, Facts]] = {}

    def __iter__(self) -> Iterator[Facts]:
        known: dict[str, tuple[int, Facts]] = {}
        for kept in self._store.all("DistributedApp"):
            key = f"{kept.namespace}/{kept.name}"
            before = self._known.get(key)
            known[key] = before if before and before[0] == kept.version else (kept.version, _facts(key, kept))
        self._known = known
        return iter([facts for _, facts in known.values()])

    def concerned(self, change: Change) -> list[tuple[str, float]]:
        """Return the keys that a change concerns, each with the seconds after which to look."""
        kind, it = change.kind, change.any
        match kind:
            case "DistributedApp":
                return [(f"{it.namespace}/{it.name}", 0.0)]
            case "MachineType":
                return [(f"{MACHINE_TYPE_PREFIX}{it.name}", 0.0), *((key, 0.0) for key in self._users(change))]
            case "Node":
                waiting = (each.key for each in self if each.machine_type and each.waits_for_machine)
                types = (f"{MACHINE_TYPE_PREFIX}{each.name}" for each in self._store.all("MachineType"))
                return [(key, NODES_SETTLE) for key in (*types, *waiting)]
            case "ConfigMap":
                named = (each for each in self if (each.namespace, each.config_map) == (it.namespace, it.name))
                return [(each.key, 0.0) for each in named]
            case _:
                owners = {(kept.namespace, kept.app) for kept in (change.old, change.new) if kept and kept.app}
                after = PROGRESS_SETTLES if _is_progress(change) else 0.0
                return [(f"{namespace}/{app}", after) for namespace, app in sorted(owners)]

    def _users(self, change: Change) -> list[str]:
        names = {change.any.name}
        for kept in (change.old, change.new):
            if kept is not None:
                names.update(_lenient(kept).spec.aliases)
        return [each.key for each in self if each.machine_type and (each.machine_type in names or each.has_no_machine)]


def _is_progress(change: Change) -> bool:
    """Whether nothing has to be done about it but to tell."""
    old, new = change.old, change.new
    if change.kind != "Pod" or new is None or (old is not None and old.uid != new.uid):
        return False
    return old is None or _pod(old.data).verdict == _pod(new.data).verdict


def _facts(key: str, kept: Kept) -> Facts:
    app = _lenient(kept)
    named = app.spec.source.configMap if app.spec.source else None
    return Facts(
        key=key,
        namespace=kept.namespace,
        machine_type=app.spec.machineType or "",
        config_map=named.name if named else "",
        conditions=tuple((each.type, each.status, each.reason) for each in app.status.conditions or ()),
    )


def _lenient(kept: Kept) -> _App:
    """What is said, or nothing where it makes no sense: the app's own run says so to its user."""
    try:
        return _decode(kept.data)
    except msgspec.MsgspecError:
        return _App()
