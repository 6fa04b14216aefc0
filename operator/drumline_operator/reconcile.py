"""One key, once: observe -> plan -> execute. The only place where plans become calls."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from drumline.contract import DEFAULT_PORT
from drumline_operator import reasons
from drumline_operator.actions import Action, Apply, Delete, Event, RequeueAfter, SetStatus
from drumline_operator.cluster import Cluster, ClusterError, Forbidden, Raw, Refused
from drumline_operator.machine_status import machine_status
from drumline_operator.machine_types import MACHINE_TYPE_PREFIX
from drumline_operator.manifests import labels
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.observe import (
    NodeView,
    Observed,
    PodView,
    SourceView,
    node_view,
    pod_views,
    runner_view,
    time_of,
    warned,
)
from drumline_operator.plan import CREATED, only_starts, plan, refused, tells_progress
from drumline_operator.settings import OperatorSettings
from drumline_operator.troubles import Trouble

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a reconcile came to. ``again``: seconds until it is wanted again; ``gone``: the object is no more."""

    again: float | None = None
    gone: bool = False
    actions: int = 0


class Load:
    """What else there is to do: nothing. A queue knows better."""

    def others_wait(self) -> bool:
        """Whether other keys are due."""
        return False

    def turn(self) -> float:
        """Return the seconds until this app's status may tell of progress, in a later run; 0: in any."""
        return 0.0

    def until_told(self) -> float:
        """Return the seconds until this app's status may tell of progress; 0: now, and it does."""
        return 0.0


_NONE: Final = Load()


async def reconcile(
    key: str,
    cluster: Cluster,
    clock: Callable[[], datetime],
    settings: OperatorSettings,
    load: Load = _NONE,
) -> Outcome:
    """Bring one app (``namespace/name``) or MachineType (``machinetype:name``) nearer to what is wanted.

    Args:
        key: which.
        cluster: where.
        clock: the time, with its zone.
        settings: the operator's own.
        load: what else there is to do. Where other keys are due, the run of a new app ends between two of its stages, and
            goes on behind them.

    Raises:
        ClusterError: something could not be read or done; the next run starts from what is then there.
    """
    if key.startswith(MACHINE_TYPE_PREFIX):
        return await _machine_type(key.removeprefix(MACHINE_TYPE_PREFIX), cluster, clock)
    namespace, _, name = key.partition("/")
    raw = await cluster.get("DistributedApp", namespace, name)
    if raw is None:
        return Outcome(gone=True)
    # A call for each of a thousand pods that only wait for their turn would make them wait longer.
    patient = load.others_wait() and only_starts(raw)
    before = None if patient else clock() - timedelta(seconds=settings.progress_interval)
    observed = await observe(raw, cluster, before)
    actions = plan(raw, observed, clock(), settings)
    try:
        again = await execute(raw, actions, cluster, observed.children, load)
    except Refused as error:
        trouble = Trouble(reasons.REFUSED, str(error))
        status = refused(raw, trouble, clock())
        if status != raw.get("status"):
            await cluster.set_status(raw, status)
            await _tell(cluster, raw, Event("Warning", trouble.reason, trouble.message))
        raise
    return Outcome(again=again, actions=len(actions))


async def observe(raw: Raw, cluster: Cluster, before: datetime | None = None) -> Observed:
    """Read everything that the plan for ``raw`` depends on; of pods made ``before`` that have not begun also why."""
    namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
    spec = raw.get("spec") or {}
    children = {kind: found for kind in API_VERSIONS if (found := await cluster.get(kind, namespace, name)) is not None}
    pods = await cluster.list("Pod", namespace, labels.text(labels.selector(name)))
    views = tuple([await _warned(cluster, namespace, view, before) for view in pod_views(pods)])
    machine_types: Sequence[Raw] = ()
    nodes: tuple[NodeView, ...] | None = None
    if spec.get("machineType"):
        machine_types = await cluster.list("MachineType", None)
        nodes = await _nodes(cluster)
    port = int((spec.get("serving") or {}).get("port") or DEFAULT_PORT)
    by_name = {pod["metadata"]["name"]: pod for pod in pods}
    asked = [view.name for view in views if view.ip and view.worker is not None and view.worker.running]
    answers = await asyncio.gather(*(cluster.runner_status(by_name[each], port) for each in asked))
    runners = {
        each: view
        for each, body in zip(asked, answers, strict=True)
        if body and (view := runner_view(body)) is not None
    }
    source = await _source(cluster, namespace, spec)
    return Observed(children, views, tuple(machine_types), nodes, source, runners)


async def execute(
    raw: Raw, actions: Sequence[Action], cluster: Cluster, present: Collection[str], load: Load
) -> float | None:
    """Perform ``actions`` in order; return the seconds after which to look again.

    Of many new apps all have their small children before the first Deployment is made, from when on the cluster's
    controllers, scheduler and kubelets take most of what the API server can do; and all have their Deployment before the
    first status is written, which by then often says all there is to say. One app alone is done in one run.

    Args:
        raw: the app.
        actions: what is planned for it.
        cluster: where.
        present: kinds of its children that are there.
        load: what else there is to do.

    Raises:
        ClusterError: the first action that failed; those after it are not tried.
    """
    again: list[float] = []
    made, untold = False, list[str]()
    for action in actions:
        if made and _begins_a_stage(action) and load.others_wait():
            if untold:
                await _tell(cluster, raw, Event("Normal", CREATED, f"{', '.join(untold)} made"))
            # A run that would only learn when the status may tell of progress is not worth its time.
            progress = isinstance(action, SetStatus) and tells_progress(raw, action.status)
            return min([*again, load.turn() if progress else 0.0])
        match action:
            case Apply(manifest, reason):
                log.info("%s: %s", raw["metadata"]["name"], reason)
                await cluster.apply(manifest)
                if manifest["kind"] not in present:
                    made = True
                    untold.append(manifest["kind"])
            case Delete(kind, name, uid, reason, orphan):
                log.info("%s: %s", raw["metadata"]["name"], reason)
                await cluster.delete(kind, raw["metadata"]["namespace"], name, uid, orphan=orphan)
            case SetStatus(status):
                if tells_progress(raw, status) and (wait := load.until_told()) > 0:
                    again.append(wait)
                    break  # the event that may follow says the same
                await cluster.set_status(raw, status)
            case RequeueAfter(seconds):
                again.append(seconds)
            case Event():
                if action.reason == CREATED:
                    untold.clear()
                await _tell(cluster, raw, action)
    return min(again, default=None)


def _begins_a_stage(action: Action) -> bool:
    return isinstance(action, SetStatus) or (isinstance(action, Apply) and action.manifest["kind"] == "Deployment")


async def _tell(cluster: Cluster, raw: Raw, event: Event) -> None:
    """Events are for people: one that is lost stops nothing."""
    try:
        await cluster.event(raw, event.type, event.reason, event.message)
    except ClusterError as error:
        log.warning("%s: event %s is lost: %s", raw["metadata"]["name"], event.reason, error)


async def _warned(cluster: Cluster, namespace: str, view: PodView, before: datetime | None) -> PodView:
    born = time_of(view.created)
    if not view.begins or view.deleting or before is None or born is None or born > before:
        return view
    try:
        return replace(view, warned=warned(await cluster.pod_warnings(namespace, view.uid)))
    except Forbidden:
        return view  # with the roles of an older chart


async def _nodes(cluster: Cluster) -> tuple[NodeView, ...] | None:
    try:
        found = await cluster.list("Node", None)
    except Forbidden:
        return None
    return _node_views.of(found)


class _NodeViews:
    """Those of the last list: a port gives the same one while nothing changes, and a thousand apps look at all nodes."""

    def __init__(self) -> None:
        self._list: Sequence[Raw] = ()
        self._views: tuple[NodeView, ...] = ()

    def of(self, found: Sequence[Raw]) -> tuple[NodeView, ...]:
        if found is not self._list:
            self._list, self._views = found, tuple(map(node_view, found))
        return self._views


_node_views = _NodeViews()


async def _source(cluster: Cluster, namespace: str, spec: Any) -> SourceView | None:
    name = ((spec.get("source") or {}).get("configMap") or {}).get("name")
    if not name:
        return None
    found = await cluster.get("ConfigMap", namespace, name)
    if found is None:
        return SourceView(exists=False)
    content = json.dumps([found.get("data") or {}, found.get("binaryData") or {}], sort_keys=True)
    return SourceView(exists=True, digest=hashlib.sha256(content.encode()).hexdigest()[:16])


async def _machine_type(name: str, cluster: Cluster, clock: Callable[[], datetime]) -> Outcome:
    raw = await cluster.get("MachineType", None, name)
    if raw is None:
        return Outcome(gone=True)
    status = machine_status(raw, await _nodes(cluster), clock())
    if status == raw.get("status"):
        return Outcome()
    await cluster.set_status(raw, status)
    return Outcome(actions=1)
