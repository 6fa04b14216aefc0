"""The port to the cluster with reads from what is watched; writes go to the API server, and their answers into the store.

A run after a write therefore never sees the state before it, and does not write again.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from drumline_operator.cluster import Conflict, Forbidden, Raw, Refused
from drumline_operator.kube import KubeCluster
from drumline_operator.manifests import labels
from drumline_operator.store import Store
from drumline_operator.trimmed import Kept, keep, whole

_APP: Final = re.compile(re.escape(labels.APP) + "=([^,]+)")
#: Seconds for which an app counts as being there after it was read from the API server or its watch has shown it, unless
#: one of its children goes.
_CONFIRMED: Final = 60.0
_Place = tuple[str, str, str]


class _DeletedMeta(msgspec.Struct):
    deletionTimestamp: str | None = None  # noqa: N815 - the API's own name


class _Deleted(msgspec.Struct):
    metadata: _DeletedMeta


class _Owner(msgspec.Struct):
    uid: str = ""
    controller: bool = False


class _OwnedMeta(msgspec.Struct):
    ownerReferences: tuple[_Owner, ...] = ()  # noqa: N815 - the API's own name


class _Owned(msgspec.Struct):
    metadata: _OwnedMeta


_deleted: Final = msgspec.json.Decoder(_Deleted).decode
_owned: Final = msgspec.json.Decoder(_Owned).decode


class CachedCluster:
    """A :class:`drumline_operator.cluster.Cluster`.

    Args:
        kube: the API server.
        store: what is watched.
        runner: returns what the runner of a pod (by uid) said last.
        tell: has an event posted: about which object, its type, reason and message.
        watched: whether a kind is watched in a namespace; what is not is read from the API server.
        refused: whether the API server does not show a kind.
        clock: seconds.
    """

    def __init__(
        self,
        kube: KubeCluster,
        store: Store,
        *,
        runner: Callable[[str], Awaitable[Raw | None]],
        tell: Callable[[Raw, str, str, str], None],
        watched: Callable[[str, str], bool],
        refused: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._kube, self._store, self._runner, self._tell = kube, store, runner, tell
        self._watched, self._refused, self._clock = watched, refused, clock
        self._foreign: set[_Place] = set()
        self._confirmed: dict[tuple[str, str], tuple[str, float]] = {}
        self._contents: dict[tuple[str, str], Kept] = {}
        self._decoded: dict[str, tuple[int, Sequence[Raw]]] = {}

    def shown(self, namespace: str, name: str, uid: str) -> None:
        """An app's watch has just shown it."""
        self._confirmed[namespace, name] = uid, self._clock()

    def doubted(self, namespace: str, name: str) -> None:
        """An app may be gone: it is read from the API server before anything is made for it."""
        self._confirmed.pop((namespace, name), None)

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return an object, or None when there is none."""
        if kind == "ConfigMap":
            return await self._config_map(namespace or "", name)
        if (kind, namespace or "", name) in self._foreign:
            found = await self._kube.get(kind, namespace, name)
            if found is None:
                self._foreign.discard((kind, namespace or "", name))
            return found
        return self._store.get(kind, namespace or "", name)

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Raw]:
        """Return all objects of a kind that carry the labels of ``selector``."""
        if self._refused(kind):
            raise Forbidden(f"the operator may not list {kind}")
        app = _APP.fullmatch(selector)
        if app is not None and namespace is not None:
            return self._store.of_app(kind, namespace, app[1])
        assert not selector, "only an app's label is watched for"
        before = self._decoded.get(kind)
        state = self._store.state(kind)
        if before is None or before[0] != state:
            before = self._decoded[kind] = state, [whole(kind, kept) for kept in self._store.all(kind)]
        return before[1]

    async def apply(self, manifest: Raw) -> None:
        """Make an object be like ``manifest``.

        Raises:
            Conflict: the app is gone, or the name belongs to an object that is not the app's.
        """
        kind, meta = manifest["kind"], manifest["metadata"]
        namespace, name = meta["namespace"], meta["name"]
        if self._store.peek(kind, namespace, name) is None:
            owner = meta["ownerReferences"][0]
            await self._confirm(owner["kind"], namespace, owner["name"], owner["uid"])
            try:
                with self._store.writing(kind, namespace, name):
                    self._store.written(kind, await self._kube.make(manifest))
            except (Conflict, Refused):
                await self._not_taken(kind, namespace, name, owner["uid"])
            else:
                return
        with self._store.writing(kind, namespace, name):
            self._store.written(kind, await self._kube.apply(manifest))

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, orphan: bool = False) -> None:
        """Delete an object if it has this uid; one that is gone already is no error. ``orphan``: what it owns stays."""
        answer = await self._kube.delete(kind, namespace, name, uid, orphan=orphan)
        # What is gone at once is answered with a Status or with its last state, what ends in its own time with a time.
        if answer is not None and _deleted(answer).metadata.deletionTimestamp:
            self._store.written(kind, answer)
        else:
            self._store.deleted(kind, namespace, name, uid)

    async def set_status(self, raw: Raw, status: Raw) -> None:
        """Write the status of ``raw``, if nobody has changed it since."""
        kind, namespace, name = raw["kind"], raw["metadata"].get("namespace") or "", raw["metadata"]["name"]
        try:
            with self._store.writing(kind, namespace, name):
                self._store.written(kind, await self._kube.set_status(raw, status))
        except Conflict:
            await self._refresh(kind, namespace, name)
            raise

    async def event(self, raw: Raw, type: str, reason: str, message: str) -> None:
        """Have an event attached to ``raw``, after everything else."""
        self._tell(raw, type, reason, message)

    async def pod_warnings(self, namespace: str, uid: str) -> Sequence[Raw]:
        """Return the Warning events about a pod; they are not watched."""
        return await self._kube.pod_warnings(namespace, uid)

    async def runner_status(self, pod: Raw, port: int) -> Raw | None:
        """Return what the runner in ``pod`` said last about its ranks."""
        return await self._runner(pod["metadata"].get("uid", ""))

    async def _config_map(self, namespace: str, name: str) -> Mapping[str, Any] | None:
        """Only the metadata is watched; the content is read once for each version."""
        place = namespace, name
        if not self._watched("ConfigMap", namespace):
            return await self._kube.get("ConfigMap", namespace, name)
        seen = self._store.peek("ConfigMap", namespace, name)
        if seen is None:
            self._contents.pop(place, None)
            return None
        content = self._contents.get(place)
        if content is None or content.version < seen.version or content.uid != seen.uid:
            text = await self._kube.read("ConfigMap", namespace, name)
            if text is None:
                return None
            content = self._contents[place] = keep("ConfigMap", text)
        return whole("ConfigMap", content)

    async def _confirm(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Nothing is made for an app that was deleted without a word: the garbage collector would only remove it."""
        now = self._clock()
        known = self._confirmed.get((namespace, name))
        if known is not None and known[0] == uid and now - known[1] < _CONFIRMED:
            return
        found = await self._refresh(kind, namespace, name)
        if found is None or found.uid != uid:
            self.doubted(namespace, name)
            raise Conflict(f"{kind} {name} is gone, or is another one now")
        self._confirmed[namespace, name] = uid, now

    async def _refresh(self, kind: str, namespace: str, name: str) -> Kept | None:
        text = await self._kube.read(kind, namespace or None, name)
        if text is not None:
            self._store.seen(kind, text, looked=True)
            return self._store.peek(kind, namespace, name)
        old = self._store.peek(kind, namespace, name)
        if old is not None:
            self._store.deleted(kind, namespace, name, old.uid)
        return None

    async def _not_taken(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """What does not carry our label is not watched; it may be there all the same, and is not ours to change."""
        text = await self._kube.read(kind, namespace, name)
        if text is not None and not any(
            each.controller and each.uid == uid for each in _owned(text).metadata.ownerReferences
        ):
            self._foreign.add((kind, namespace, name))
            raise Conflict(f"a {kind} {name} exists already and is not this app's")
