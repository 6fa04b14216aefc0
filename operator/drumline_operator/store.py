"""What is known of the cluster: the newest version of every watched object. PURE: told by watches and by own writes.

Versions of objects grow with every write, also across objects of a kind, so an old event never replaces what a later
write gave back. A run that follows a write therefore sees that write, however late the watch is. What others had written
just before is part of what a write gives back, and nobody has looked at it yet: it is told when its watch comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import Raw

from drumline_operator.trimmed import Kept, keep, whole

#: Of these only the version says that they changed: nothing else of them is watched.
_BY_VERSION: Final = {"ConfigMap"}


@dataclass(frozen=True)
class Change:
    """An object is another one than before. ``old``: None when it is new; ``new``: None when it is gone."""

    kind: str
    old: Kept | None
    new: Kept | None

    @property
    def any(self) -> Kept:
        """The object as it is or, when it is gone, was."""
        found = self.new or self.old
        assert found is not None
        return found


@dataclass
class _Writing:
    """An object that is being written: what its watch has shown meanwhile, and the version that the answer has."""

    shown: list[Change] = field(default_factory=list)
    answer: int = 0


class Store:
    """Objects by kind, namespace and name. ``on_change`` is told of what watches, not own writes, have changed."""

    def __init__(self, on_change: Callable[[Change], None] = lambda change: None) -> None:
        self.on_change = on_change
        self._objects: dict[str, dict[tuple[str, str], Kept]] = {}
        self._by_app: dict[tuple[str, str, str], set[str]] = {}
        self._buried: dict[str, set[str]] = {}
        self._states: dict[str, int] = {}
        self._writing: dict[tuple[str, str, str], _Writing] = {}
        #: Versions of our own that their watch has not come to yet.
        self._unseen: dict[tuple[str, str, str], set[int]] = {}

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None when there is none."""
        kept = self.peek(kind, namespace, name)
        return None if kept is None else whole(kind, kept)

    def peek(self, kind: str, namespace: str, name: str) -> Kept | None:
        """Return what is kept of an object, or None when there is none."""
        return self._objects.get(kind, {}).get((namespace, name))

    def of_app(self, kind: str, namespace: str, app: str) -> list[dict[str, Any]]:
        """Return the objects that carry an app's label."""
        objects = self._objects.get(kind, {})
        return [whole(kind, objects[namespace, name]) for name in sorted(self._by_app.get((kind, namespace, app), ()))]

    def all(self, kind: str) -> Iterator[Kept]:
        """Yield what is kept of all objects of a kind."""
        yield from list(self._objects.get(kind, {}).values())

    def count(self, kind: str) -> int:
        """Return how many objects of a kind there are."""
        return len(self._objects.get(kind, {}))

    def state(self, kind: str) -> int:
        """Return a number that is another one after every change of a kind's objects."""
        return self._states.get(kind, 0)

    def seen(self, kind: str, text: bytes | Raw, *, looked: bool = False) -> None:
        """A watch has shown an object; ``looked``: it was read, and its watch comes to that version in its own time."""
        kept = keep(kind, text)
        place = kind, kept.namespace, kept.name
        now, own = self.peek(*place), kept.version in self._unseen.get(place, ())
        if not looked:
            self._passed(place, kept.version)
            if now is not None and now.version > kept.version and not own:
                self._tell_again(kind, now)
        self._put(kind, kept, told=True)

    def gone(self, kind: str, text: bytes | Raw) -> None:
        """A watch has shown that an object is gone, or has lost the label that is watched for."""
        last = keep(kind, text)
        self._buried.get(kind, set()).discard(last.uid)
        old = self.peek(kind, last.namespace, last.name)
        if old is not None and old.version <= last.version:
            self._drop(kind, old)
            self._tell(Change(kind, old, None))

    def replace(self, kind: str, namespace: str | None, found: Iterable[Kept], version: int) -> None:
        """A list has shown all objects of a kind, in one namespace or (None) in all.

        Args:
            kind: of the objects.
            namespace: the list's.
            found: the objects.
            version: the list's own; what was written after it may be missing in it.
        """
        present = set()
        for kept in found:
            place = kind, kept.namespace, kept.name
            present.add(place[1:])
            now, own = self.peek(*place), kept.version in self._unseen.get(place, ())
            self._passed(place, kept.version)
            # The watch goes on behind the list: whatever was written before an answer of ours is not shown any more.
            if now is not None and (now.version == kept.version if own else now.version > kept.version):
                self._tell_again(kind, now)
            self._put(kind, kept, told=True)
        self._buried.pop(kind, None)
        for named, old in list(self._objects.get(kind, {}).items()):
            if named not in present and namespace in {None, old.namespace} and old.version <= version:
                self._drop(kind, old)
                self._tell(Change(kind, old, None))

    def written(self, kind: str, text: bytes) -> None:
        """The API server has answered a write of our own with this object."""
        kept = keep(kind, text)
        if (writing := self._writing.get((kind, kept.namespace, kept.name))) is not None:
            writing.answer = kept.version
        if (old := self.peek(kind, kept.namespace, kept.name)) is None or old.version < kept.version:
            self._unseen.setdefault((kind, kept.namespace, kept.name), set()).add(kept.version)
        self._put(kind, kept, told=False)

    @contextmanager
    def writing(self, kind: str, namespace: str, name: str) -> Iterator[None]:
        """Put off what a watch tells of an object while it is written; of our own write nothing is told, if it comes first."""
        place = kind, namespace, name
        writing = self._writing[place] = _Writing()
        try:
            yield
        finally:
            del self._writing[place]
            for change in writing.shown:
                if change.new is None or change.new is change.old or change.new.version != writing.answer:
                    self.on_change(change)

    def deleted(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """The API server has removed an object at our wish; events about it that are on their way are ignored."""
        old = self.peek(kind, namespace, name)
        if old is not None and old.uid == uid:
            self._drop(kind, old)
            self._buried.setdefault(kind, set()).add(uid)

    def forget(self, kind: str, namespace: str) -> None:
        """Nobody watches a kind in this namespace any more."""
        for old in list(self._objects.get(kind, {}).values()):
            if old.namespace == namespace:
                self._drop(kind, old)

    def _put(self, kind: str, kept: Kept, *, told: bool) -> None:
        if kept.uid in self._buried.get(kind, ()):
            return
        old = self.peek(kind, kept.namespace, kept.name)
        if old is not None:
            if old.version >= kept.version:
                return
            self._unindex(kind, old)
        self._states[kind] = self.state(kind) + 1
        self._objects.setdefault(kind, {})[kept.namespace, kept.name] = kept
        if kept.app:
            self._by_app.setdefault((kind, kept.namespace, kept.app), set()).add(kept.name)
        if told and (old is None or old.data != kept.data or kind in _BY_VERSION):
            self._tell(Change(kind, old, kept))

    def _tell_again(self, kind: str, now: Kept) -> None:
        """Others have written what a later answer to us already holds: the object as it is was not looked at since."""
        self._tell(Change(kind, now, now))

    def _tell(self, change: Change) -> None:
        writing = self._writing.get((change.kind, change.any.namespace, change.any.name))
        if writing is None:
            self.on_change(change)
        else:
            writing.shown.append(change)

    def _passed(self, place: tuple[str, str, str], version: int) -> None:
        """The watch of an object will not show versions up to this one any more."""
        left = {each for each in self._unseen.pop(place, ()) if each > version}
        if left:
            self._unseen[place] = left

    def _drop(self, kind: str, old: Kept) -> None:
        self._states[kind] = self.state(kind) + 1
        del self._objects[kind][old.namespace, old.name]
        self._unseen.pop((kind, old.namespace, old.name), None)
        self._unindex(kind, old)

    def _unindex(self, kind: str, old: Kept) -> None:
        key = kind, old.namespace, old.app
        names = self._by_app.get(key)
        if names is not None:
            names.discard(old.name)
            if not names:
                del self._by_app[key]
