"""(app, what is observed, now) -> what to do. PURE: the same input gives the same plan; nothing to do gives ``()``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from drumline.api.manifests import sentences
from drumline.api.v1alpha1 import DistributedApp
from drumline.errors import ConfigurationError
from drumline_operator import machine_types, reasons, remake, status
from drumline_operator.actions import Action, Apply, Delete, Event, RequeueAfter, SetStatus
from drumline_operator.diff import first_difference
from drumline_operator.machine_types import Machine, NoMachine
from drumline_operator.manifests import deployment, networkpolicy, pdb, service
from drumline_operator.manifests.context import Context
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.observe import Observed, time_of
from drumline_operator.settings import OperatorSettings
from drumline_operator.troubles import Trouble

#: Seconds until the garbage collector has taken away what an app of the same name left behind.
_LEFTOVER: Final = 2.0
#: Reason of the event that tells what was made.
CREATED: Final = "Created"
_DEFAULTS: Final = OperatorSettings()
#: Of an app that is on its way.
_PROGRESS: Final = {reasons.STARTING, reasons.LOADING_MODEL}


def plan(
    raw: Mapping[str, Any], observed: Observed, now: datetime, settings: OperatorSettings = _DEFAULTS
) -> tuple[Action, ...]:
    """Return what to do about one app, in order.

    Args:
        raw: the app as the API server has it.
        observed: its children and surroundings.
        now: the time, with its zone.
        settings: the operator's own.
    """
    if raw["metadata"].get("deletionTimestamp"):
        return ()  # its children are owned: the garbage collector removes them, also when no operator runs
    try:
        app = validated(raw, settings)
        context, machine, blocked = _surroundings(raw, app, observed, settings)
        children = tuple(_told_last(_children(context, observed, blocked, now)))
    except ConfigurationError as error:
        return tuple(_with_news(raw, refused(raw, Trouble(reasons.INVALID_SPEC, str(error)), now)))
    except _NameTaken as taken:
        news = _with_news(raw, refused(raw, Trouble(reasons.NAME_TAKEN, str(taken)), now))
        return (*news, RequeueAfter(settings.progress_interval))  # other people's objects are not watched
    written = status.app_status(raw, context, observed, machine, now, blocked=blocked)
    return (
        *children,
        *_broken_pods(context, observed, now, settings),
        *_beginning_pods(observed, now, settings),
        *_with_news(raw, written),
    )


def refused(raw: Mapping[str, Any], trouble: Trouble, now: datetime) -> dict[str, Any]:
    """Return the status that says why nothing is done."""
    cured = Trouble(trouble.reason, f"{trouble.message} ({reasons.CURES[trouble.reason]})")
    return status.refused_status(raw, cured, now)


def validated(raw: Mapping[str, Any], settings: OperatorSettings) -> DistributedApp:
    """Return the app.

    Raises:
        ConfigurationError: its spec is wrong; the message names the field and the cure.
    """
    document = {key: raw[key] for key in ("apiVersion", "kind", "metadata", "spec") if key in raw}
    try:
        app = DistributedApp.model_validate(document, by_name=False)
    except ValidationError as error:
        raise ConfigurationError("; ".join(sentences(error, DistributedApp))) from None
    if app.spec.image is None and app.spec.source is None:
        raise ConfigurationError("spec.image is missing; set spec.image, spec.source, or both")
    if app.spec.image is None and not settings.worker_image:
        raise ConfigurationError("spec.image is missing, and this operator has no image for sources; set spec.image")
    return app


def _surroundings(
    raw: Mapping[str, Any], app: DistributedApp, observed: Observed, settings: OperatorSettings
) -> tuple[Context, Machine | None, Trouble | None]:
    machine = machine_types.resolve(app.spec, observed.machine_types, observed.nodes)
    named = app.spec.source.config_map if app.spec.source else None
    source = observed.source
    blocked = None
    if isinstance(machine, NoMachine):
        blocked, machine = Trouble(reasons.NO_MACHINE, machine.message), None
    elif named is not None and (source is None or not source.exists):
        blocked = Trouble(reasons.CONFIG_MAP_NOT_FOUND, f"there is no ConfigMap {named.name}")
    context = Context(
        app=app,
        uid=raw["metadata"].get("uid", ""),
        settings=settings,
        machine=machine.spec if machine else None,
        source_digest=source.digest if source and named else "",
    )
    return context, machine, blocked


class _NameTaken(Exception):
    """A child's name belongs to somebody else."""


def _children(context: Context, observed: Observed, blocked: Trouble | None, now: datetime) -> Iterator[Action]:
    """What is wrong with the children; a blocked app gets no new pods, but those that run are scaled and suspended."""
    live = observed.children.get("Deployment")
    if blocked is None:
        pods: dict[str, Any] | None = deployment.build(context, live)
    elif live is None or _owner(live).get("uid") != context.uid:
        return
    else:
        pods = deployment.with_the_same_pods(context, live)
    built = {
        "Service": service.build(context),
        "NetworkPolicy": networkpolicy.build(context),
        "PodDisruptionBudget": pdb.build(context),
        "Deployment": pods,
    }
    for kind in API_VERSIONS:
        wanted, found = built[kind], observed.children.get(kind)
        if kind == "Deployment" and pods is None:
            continue  # nobody knows what it should be: it stays as it is
        owned = found is not None and _owner(found).get("uid") == context.uid
        if found is not None and not owned and wanted is not None:
            if _leftover(found, context.name):
                yield RequeueAfter(_LEFTOVER)
                continue
            raise _NameTaken(f"a {kind} {context.name} exists already and is not this app's")
        if found is not None and found["metadata"].get("deletionTimestamp"):
            yield RequeueAfter(_LEFTOVER)
        elif wanted is None and found is not None and owned:
            yield Delete(kind, context.name, found["metadata"].get("uid", ""), f"{kind} is not wanted any more")
            yield Event("Normal", "Deleted", f"{kind} is not wanted any more")
        elif wanted is not None and found is None:
            yield Apply(wanted, f"{kind} made")
            yield Event("Normal", CREATED, kind)
        elif wanted is not None and found is not None and blocked is None and (words := remake.why(wanted, found)):
            if left := _too_young(found["metadata"].get("creationTimestamp"), now, context.settings):
                yield RequeueAfter(left)
                continue
            yield Delete(kind, context.name, found["metadata"].get("uid", ""), words, remake.keeps_pods(wanted, found))
            yield Event("Warning", "MadeAnew", f"{kind} is deleted and made anew: {words}")
            yield RequeueAfter(_LEFTOVER)
        elif wanted is not None and found is not None and (words := first_difference(wanted, found)):
            yield Apply(wanted, f"{kind}: {words}")
            yield Event("Normal", "Updated", f"{kind}: {words}")


def _told_last(actions: Iterator[Action]) -> Iterator[Action]:
    """What is done first, then the events; all that is made at once is one event."""
    made, told = [], []
    for action in actions:
        if isinstance(action, Event) and action.reason == CREATED:
            made.append(action.message)
        elif isinstance(action, Event):
            told.append(action)
        else:
            yield action
    if made:
        yield Event("Normal", CREATED, f"{', '.join(made)} made")
    yield from told


def _owner(found: Mapping[str, Any]) -> Mapping[str, Any]:
    owners = found["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})


def _leftover(found: Mapping[str, Any], name: str) -> bool:
    """Whether it belonged to an app of this name that was deleted, and will go away by itself."""
    owner = _owner(found)
    return bool(found["metadata"].get("deletionTimestamp")) or (
        owner.get("kind") == "DistributedApp" and owner.get("name") == name
    )


def _broken_pods(context: Context, observed: Observed, now: datetime, settings: OperatorSettings) -> Iterator[Action]:
    """With RecreatePod, a pod whose container ended is replaced, but none that is younger than the interval.

    A new pod knows nothing of the kubelet's back-off: without a bound of ours it would be replaced at once, for ever.
    """
    if context.app.spec.failure_policy.type != "RecreatePod":
        return
    for pod in observed.pods:
        if pod.deleting or pod.worker is None or pod.worker.waiting != "CrashLoopBackOff":
            continue
        if left := _too_young(pod.created, now, settings):
            yield RequeueAfter(left)
            continue
        yield Delete("Pod", pod.name, pod.uid, f"{pod.name} is replaced: its worker container ended")
        yield Event("Warning", "PodReplaced", f"{pod.name} is replaced: its worker container ended")


def _with_news(raw: Mapping[str, Any], written: dict[str, Any]) -> Iterator[Action]:
    """The status, when it is another one, and an event when the verdict on Ready is."""
    before = raw.get("status") or {}
    if before == written:
        return
    yield SetStatus(written)
    old, new = _ready(before), _ready(written)
    if not old and new["reason"] == reasons.STARTING:
        return  # that its children were made says as much
    if (old.get("status"), old.get("reason")) != (new["status"], new["reason"]):
        yield Event("Warning" if new["reason"] in reasons.CURES else "Normal", new["reason"], new["message"])


def tells_progress(raw: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether ``written`` says only how far an app is that starts: nothing is wrong with it, and it was no more before."""
    return _ready(written)["reason"] in _PROGRESS and only_starts(raw)


def only_starts(raw: Mapping[str, Any]) -> bool:
    """Whether the status says no more than that the app starts."""
    ready = _ready(raw.get("status") or {})
    return not ready or ready.get("reason") in _PROGRESS


def _ready(written: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((each for each in written.get("conditions") or () if each.get("type") == "Ready"), {})


def _beginning_pods(observed: Observed, now: datetime, settings: OperatorSettings) -> Iterator[Action]:
    """Warnings are not watched: of a pod that does not begin they are looked at again, ever less often."""
    for pod in observed.pods:
        if pod.begins and not pod.deleting and (born := time_of(pod.created)):
            yield RequeueAfter(max(settings.progress_interval, (now - born).total_seconds() / 2))


def _too_young(created: str | None, now: datetime, settings: OperatorSettings) -> float:
    """Return the seconds until what was made then may be replaced: nothing is replaced again and again without a pause."""
    born = time_of(created)
    return max(0.0, settings.replace_interval - (now - born).total_seconds()) if born else 0.0
