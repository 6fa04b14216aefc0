"""What to do when a server-side apply of a child that exists is refused: its spec is made exactly ours first.

Apply merges. Where somebody has changed what an item of a keyed list is known by (a Service's port, a container's port),
ours comes beside theirs; where they have chosen another member of a union (another kind of probe or volume), both are
there. The API server takes neither, for ever, though nothing is wrong with what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from drumline_operator.cluster import Raw, Refused
from drumline_operator.manifests.names import FIELD_MANAGER


class Server(Protocol):
    """The calls of an API server that this needs."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return an object, or None when there is none."""
        ...

    async def patch(self, kind: str, namespace: str | None, name: str, operations: Sequence[Raw]) -> Raw:
        """Change an object by a JSON patch; return it as it then is."""
        ...


async def take_over(server: Server, manifest: Raw, refusal: Refused) -> None:
    """Make the spec of a live child what ``manifest`` says and nothing else; then an apply has nothing to merge.

    What the API server has allocated (a Service's addresses) stays, and so do labels and annotations of other people.

    Raises:
        Refused: ``refusal``, when there is no such child of the same app; the API server's own, when it does not take this
            spec on its own either, so that the drift is not to blame.
        ClusterError: a call failed; Conflict: somebody changed the object meanwhile.
    """
    kind, meta = manifest["kind"], manifest["metadata"]
    place = kind, meta.get("namespace"), meta["name"]
    live = await server.get(*place)
    owner = _owner(manifest)
    if live is None or owner is None or _owner(live) != owner:
        raise refusal
    only = [
        {"op": "add", "path": f"/metadata/{key}", "value": live["metadata"][key]} for key in ("uid", "resourceVersion")
    ]
    changed = await server.patch(*place, [*only, {"op": "replace", "path": "/spec", "value": manifest["spec"]}])
    # Fields that are ours by an update, too, would stay when an apply later leaves them out.
    fields = changed["metadata"].get("managedFields") or ()
    kept = [each for each in fields if not _our_update(each)]
    if kept and len(kept) < len(fields):
        await server.patch(*place, [{"op": "replace", "path": "/metadata/managedFields", "value": kept}])


def _owner(raw: Raw) -> str | None:
    owners = raw["metadata"].get("ownerReferences") or ()
    return next((each.get("uid") for each in owners if each.get("controller")), None)


def _our_update(entry: Mapping[str, Any]) -> bool:
    return entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Update" and not entry.get("subresource")
