"""Raw objects of the API server -> frozen views of what matters. PURE, and total: a field that is missing is None."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from drumline_operator.manifests.labels import REVISION
from drumline_operator.manifests.pod import SOURCE_CONTAINER, WORKER_CONTAINER

Raw = Mapping[str, Any]
#: Events of kubelets and of the controller that attaches volumes.
MOUNT_WARNINGS: Final = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
WARNINGS: Final = MOUNT_WARNINGS | {"FailedCreatePodSandBox", "NetworkNotReady"}
#: The condition of a pod that its volumes and network are there; older clusters do not have it.
_SANDBOX: Final = "PodReadyToStartContainers"
#: How a container waits for that; empty: nobody has said yet.
_BEGINS: Final = {"", "ContainerCreating", "PodInitializing"}


@dataclass(frozen=True)
class RankEnd:
    """The rank that a container's end comes from, as the last line of the termination message has it."""

    rank: int
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True)
class Ended:
    """A container that ended. ``at`` is RFC 3339 text; ``rank`` is what the runner said about the rank to blame."""

    exit_code: int
    reason: str = ""
    signal: int | None = None
    message: str = ""
    at: str | None = None
    rank: RankEnd | None = None


@dataclass(frozen=True)
class ContainerView:
    """One container of a pod. ``last``: how it ended before its present run."""

    name: str
    ready: bool = False
    running: bool = False
    waiting: str = ""
    waiting_message: str = ""
    ended: Ended | None = None
    last: Ended | None = None
    restarts: int = 0

    @property
    def failure(self) -> Ended | None:
        """The last end that was a failure, if that is the last that happened."""
        return next((end for end in (self.ended, self.last) if end and end.exit_code != 0), None)


@dataclass(frozen=True)
class Warned:
    """A warning about a pod, from an event. ``reason`` and ``message`` are those of whoever warns."""

    reason: str
    message: str


@dataclass(frozen=True)
class PodView:
    """One pod of an app. ``unschedulable``: the scheduler's own words. ``created`` is RFC 3339 text.

    ``begins``: it has a node, which has not made its sandbox yet; what is wrong with that only ``warned`` tells.
    """

    name: str
    uid: str = ""
    ip: str = ""
    node: str | None = None
    revision: str = ""
    phase: str = "Pending"
    ready: bool = False
    deleting: bool = False
    created: str = ""
    unschedulable: str = ""
    reason: str = ""
    message: str = ""
    worker: ContainerView | None = None
    source: ContainerView | None = None
    begins: bool = False
    warned: Warned | None = None


@dataclass(frozen=True)
class RunnerView:
    """What the runner in a pod says about its ranks (``/readyz``)."""

    state: str
    world_size: int
    ready_ranks: int
    restarts: int = 0
    failure: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NodeView:
    """A node that takes pods, or does not."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, str | int] = field(default_factory=dict)
    schedulable: bool = True
    ready: bool = True


@dataclass(frozen=True)
class SourceView:
    """The ConfigMap that holds an app's code. ``digest`` changes with its content."""

    exists: bool
    digest: str = ""


@dataclass(frozen=True)
class Observed:
    """Everything that is known about one app's surroundings.

    Attributes:
        children: what has the app's name, by kind; also what belongs to somebody else.
        pods: the pods that carry the app's label, oldest first.
        machine_types: all of them.
        nodes: all of them; None when the operator may not see nodes.
        source: the ConfigMap with the code, for apps that name one.
        runners: by pod name; pods that do not answer are missing.
    """

    children: Mapping[str, Raw] = field(default_factory=dict)
    pods: tuple[PodView, ...] = ()
    machine_types: tuple[Raw, ...] = ()
    nodes: tuple[NodeView, ...] | None = None
    source: SourceView | None = None
    runners: Mapping[str, RunnerView] = field(default_factory=dict)


def pod_view(raw: Raw) -> PodView:
    """Return the view of a pod."""
    meta, spec, status = raw.get("metadata") or {}, raw.get("spec") or {}, raw.get("status") or {}
    conditions = {each.get("type"): each for each in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    unbound = scheduled.get("status") == "False"  # Unschedulable, SchedulingGated, SchedulerError
    containers = {
        each["name"]: _container(each)
        for key in ("initContainerStatuses", "containerStatuses")
        for each in status.get(key) or ()
    }
    return PodView(
        name=meta.get("name", ""),
        uid=meta.get("uid", ""),
        ip=status.get("podIP") or "",
        node=spec.get("nodeName"),
        revision=(meta.get("labels") or {}).get(REVISION, ""),
        phase=status.get("phase") or "Pending",
        ready=(conditions.get("Ready") or {}).get("status") == "True",
        deleting=bool(meta.get("deletionTimestamp")),
        created=meta.get("creationTimestamp") or "",
        unschedulable=(scheduled.get("message") or scheduled.get("reason") or "no node yet") if unbound else "",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        worker=containers.get(WORKER_CONTAINER),
        source=containers.get(SOURCE_CONTAINER),
        begins=bool(
            spec.get("nodeName")
            and status.get("phase", "Pending") == "Pending"
            and (conditions.get(_SANDBOX) or {}).get("status") != "True"
            and all(each.waiting in _BEGINS and not each.running and not each.ended for each in containers.values())
        ),
    )


def warned(events: Sequence[Raw]) -> Warned | None:
    """Return the newest of the warnings that say why a pod does not begin."""
    known = [each for each in events if each.get("reason") in WARNINGS]
    newest = max(known, key=_event_time, default=None)
    if newest is None:
        return None
    return Warned(newest["reason"], (newest.get("message") or newest["reason"]).strip())


def _event_time(event: Raw) -> str:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((each for each in times if each), event["metadata"].get("creationTimestamp") or "")


def _container(raw: Raw) -> ContainerView:
    state, last = raw.get("state") or {}, raw.get("lastState") or {}
    waiting = state.get("waiting") or {}
    return ContainerView(
        name=raw["name"],
        ready=bool(raw.get("ready")),
        running="running" in state,
        waiting=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        ended=_ended(state.get("terminated")),
        last=_ended(last.get("terminated")),
        restarts=int(raw.get("restartCount") or 0),
    )


def _ended(raw: Raw | None) -> Ended | None:
    if not raw:
        return None
    message, rank = _rank_end((raw.get("message") or "").strip())
    return Ended(
        exit_code=int(raw.get("exitCode") or 0),
        reason=raw.get("reason") or "",
        signal=raw.get("signal") or None,
        message=message,
        at=raw.get("finishedAt"),
        rank=rank,
    )


def _rank_end(text: str) -> tuple[str, RankEnd | None]:
    """Return what a termination message has for people, and for programs; any program may have written it."""
    words, _, last = text.rpartition("\n")
    try:
        facts = json.loads(last)
    except ValueError:
        return text, None
    if not isinstance(facts, dict) or type(facts.get("rank")) is not int:
        return text, None
    code, number = (found if type(found := facts.get(key)) is int else None for key in ("exitCode", "signal"))
    return words.strip(), RankEnd(facts["rank"], code, number)


def pod_views(raws: Sequence[Raw]) -> tuple[PodView, ...]:
    """Return the views of pods, oldest first."""
    return tuple(sorted(map(pod_view, raws), key=lambda pod: (pod.created, pod.name)))


def node_view(raw: Raw) -> NodeView:
    """Return the view of a node."""
    status = raw.get("status") or {}
    ready = [each.get("status") for each in status.get("conditions") or () if each.get("type") == "Ready"]
    return NodeView(
        name=raw["metadata"]["name"],
        labels=raw["metadata"].get("labels") or {},
        allocatable=status.get("allocatable") or {},
        schedulable=not (raw.get("spec") or {}).get("unschedulable"),
        ready=ready == ["True"],
    )


def runner_view(body: Raw) -> RunnerView | None:
    """Return what a runner said, or None when it is not a runner's status."""
    try:
        return RunnerView(
            state=str(body["state"]),
            world_size=int(body["worldSize"]),
            ready_ranks=int(body["readyRanks"]),
            restarts=int(body.get("restarts") or 0),
            failure=body.get("lastFailure") or None,
        )
    except (KeyError, TypeError, ValueError):
        return None


def time_of(text: str | None) -> datetime | None:
    """Return an RFC 3339 time of the API server, or None."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
