"""An app's status: conditions, groups, the last failure. PURE: recomputed from what is observed, every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from drumline.api.status import (
    APP_CONDITIONS,
    GROUPS_LIMIT,
    MESSAGE_LIMIT,
    Condition,
    DistributedAppStatus,
    GroupStatus,
    LastFailure,
)
from drumline_operator import reasons, troubles
from drumline_operator.machine_types import Machine
from drumline_operator.manifests import deployment, labels, service
from drumline_operator.manifests.context import Context
from drumline_operator.observe import Observed, PodView, RunnerView
from drumline_operator.troubles import Trouble

Verdict = tuple[str, str, str]  # status, reason, message
_STATES: Final = {"ready": "Serving", "restarting": "Restarting", "stopping": "Draining", "stopped": "Draining"}


@dataclass(frozen=True)
class Counts:
    """Pods of an app. ``serving``: ready and of the wanted revision."""

    wanted: int
    missing_allowed: int
    pods: tuple[PodView, ...]
    revision: str

    @property
    def present(self) -> int:
        """Pods that are not on their way out."""
        return len(self.pods)

    @property
    def ready(self) -> int:
        """Pods whose ranks are all ready."""
        return sum(pod.ready for pod in self.pods)

    @property
    def updated(self) -> int:
        """Pods of the wanted revision."""
        return sum(pod.revision == self.revision for pod in self.pods)

    @property
    def serving(self) -> int:
        """Pods that are ready and of the wanted revision."""
        return sum(pod.ready and pod.revision == self.revision for pod in self.pods)

    @property
    def needed(self) -> int:
        """Ready pods that make the app available."""
        return min(self.wanted, max(1, self.wanted - self.missing_allowed))

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.present == self.wanted == self.serving


def app_status(
    raw: Mapping[str, Any],
    context: Context,
    observed: Observed,
    machine: Machine | None,
    now: datetime,
    *,
    blocked: Trouble | None = None,
) -> dict[str, Any]:
    """Return the status of a valid app.

    Args:
        raw: the app as the API server has it.
        context: the same, validated.
        observed: what is there.
        machine: its machine.
        now: for conditions that change.
        blocked: why the operator cannot go on, e.g. a ConfigMap that is missing.
    """
    counts = count(context, observed)
    live = observed.children.get("Deployment") or {}
    trouble = blocked or troubles.of_deployment(live)
    fresh = [pod for pod in observed.pods if pod.revision == counts.revision and not pod.deleting]
    trouble = trouble or troubles.worst(fresh, observed.runners, machine, context.gpu_resource)
    if trouble is None and counts.wanted and not counts.pods:
        trouble = Trouble(reasons.STARTING, "the pods are being made")
    verdicts = _verdicts(context, counts, live, trouble)
    live_first = sorted(observed.pods, key=lambda pod: pod.phase in {"Succeeded", "Failed"})
    groups = [_group(pod, observed.runners.get(pod.name)) for pod in live_first[:GROUPS_LIMIT]]
    serving = sorted({pod.revision for pod in counts.pods if pod.ready})
    status = DistributedAppStatus(
        observed_generation=raw["metadata"].get("generation", 0),
        replicas=counts.present,
        ready_replicas=counts.ready,
        available_replicas=counts.ready,
        updated_replicas=counts.updated,
        summary=f"{counts.ready}/{counts.wanted}",
        selector=labels.text(labels.selector(context.name)),
        url=service.url(context),
        current_revision=counts.revision if counts.revision in serving else next(iter(serving), None),
        update_revision=counts.revision,
        group_restarts=sum(group.restarts or 0 for group in groups),
        last_failure=_last_failure(observed, _previous(raw)),
        groups=groups,
        conditions=conditions(raw, verdicts, now),
    )
    written = status.model_dump(by_alias=True, exclude_none=True)
    if not groups:
        # An apply that takes the last one away leaves no empty list behind: the same status would be written once more.
        del written["groups"]
    return written


def refused_status(raw: Mapping[str, Any], trouble: Trouble, now: datetime) -> dict[str, Any]:
    """Return the status of an app that the operator does nothing about; what runs is left as it was."""
    words = trouble.message
    bad: Verdict = ("False", trouble.reason, words)
    unknown: Verdict = ("Unknown", reasons.NOT_KNOWN, f"not judged: {trouble.reason}")
    verdicts = dict.fromkeys(APP_CONDITIONS, unknown) | {"Ready": bad, "Progressing": bad}
    verdicts["Failed"] = ("True", trouble.reason, words)
    verdicts["Suspended"] = _suspended(bool((raw.get("spec") or {}).get("suspend")))
    kept = {key: value for key, value in _previous(raw).items() if key not in {"conditions", "observedGeneration"}}
    fields = {"observedGeneration": raw["metadata"].get("generation", 0)}
    written = [each.model_dump(by_alias=True) for each in conditions(raw, verdicts, now)]
    return {**kept, **fields, "conditions": written}


def count(context: Context, observed: Observed) -> Counts:
    """Return how many pods there are, and should be."""
    spec = context.app.spec
    wanted = 0 if spec.suspend else spec.replicas
    missing = deployment.strategy(spec).get("rollingUpdate", {}).get("maxUnavailable", wanted)
    if isinstance(missing, str):
        missing = wanted * int(missing.removesuffix("%")) // 100
    pods = tuple(pod for pod in observed.pods if not pod.deleting and pod.phase not in {"Succeeded", "Failed"})
    return Counts(wanted, missing, pods, context.revision)


def conditions(raw: Mapping[str, Any], verdicts: Mapping[str, Verdict], now: datetime) -> list[Condition]:
    """Return all conditions; the time of one changes only with its status."""
    before = {each.get("type"): each for each in _previous(raw).get("conditions") or ()}
    stamp = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result = []
    for type, (status, reason, message) in verdicts.items():
        old = before.get(type) or {}
        same = old.get("status") == status and old.get("lastTransitionTime")
        result.append(
            Condition(
                type=type,
                status=status,  # type: ignore[arg-type] # checked by the model
                reason=reason,
                message=_shortened(message),
                observed_generation=raw["metadata"].get("generation", 0),
                last_transition_time=str(old["lastTransitionTime"]) if same else stamp,
            )
        )
    return result


def _verdicts(context: Context, counts: Counts, live: Mapping[str, Any], trouble: Trouble | None) -> dict[str, Verdict]:
    late = _deadline(live) and not counts.settled
    verdicts: dict[str, Verdict] = {
        "Ready": _ready(context, counts, trouble),
        "Available": _available(counts),
        "Progressing": _progressing(counts, trouble, late),
        "Scheduled": ("True", reasons.PODS_BOUND, "every pod has a node"),
        "SourceReady": ("True", reasons.SOURCE_FOUND, "image and code are there"),
        "RanksReady": ("True", reasons.RANKS_READY, f"{counts.serving} of {counts.wanted} groups are ready"),
        "Suspended": _suspended(context.app.spec.suspend),
        "Failed": ("True", reasons.DEADLINE, _with_cure(reasons.DEADLINE, "the rollout makes no progress"))
        if late
        else ("False", reasons.NOT_FAILED, "nothing has failed for good"),
    }
    if not counts.wanted or trouble is None:
        return verdicts
    bad: Verdict = ("False", trouble.reason, _with_cure(trouble.reason, trouble.message))
    waits: Verdict = ("Unknown", reasons.NOT_KNOWN, f"waits for {trouble.condition}")
    verdicts[trouble.condition] = bad
    if trouble.condition == "Scheduled":
        verdicts["SourceReady"] = waits
    if trouble.condition != "RanksReady":
        verdicts["RanksReady"] = ("False", trouble.reason, trouble.message)
    elif trouble.reason == reasons.STARTING:
        verdicts["SourceReady"] = waits
        if not counts.pods:
            verdicts["Scheduled"] = waits
    return verdicts


def _ready(context: Context, counts: Counts, trouble: Trouble | None) -> Verdict:
    if context.app.spec.suspend:
        return "False", reasons.SUSPENDED, "spec.suspend is true; set it to false to serve"
    if not counts.wanted:
        return "True", reasons.SCALED_TO_ZERO, "spec.replicas is 0"
    said = f"{counts.serving} of {counts.wanted} groups serve revision {counts.revision}"
    if counts.serving and counts.ready >= counts.needed:
        return "True", reasons.SERVING, said
    others = counts.ready - counts.serving
    if others:
        said += f"; {others} of an older revision still serve"
    if trouble is None:
        return "False", reasons.NEW_REVISION, said
    return "False", trouble.reason, _with_cure(trouble.reason, f"{trouble.message}; {said}")


def _available(counts: Counts) -> Verdict:
    said = f"{counts.ready} of {counts.wanted} groups are ready, {counts.needed} needed"
    if counts.ready >= counts.needed:
        return "True", reasons.ENOUGH_REPLICAS, said
    return "False", reasons.TOO_FEW_REPLICAS, said


def _progressing(counts: Counts, trouble: Trouble | None, late: bool) -> Verdict:
    said = f"{counts.updated} of {counts.wanted} pods have revision {counts.revision}, {counts.serving} are ready"
    if late:
        return "False", reasons.DEADLINE, f"{said}; {trouble.message}" if trouble else said
    if counts.settled:
        return "False", reasons.COMPLETE, said
    if counts.updated < counts.present or counts.serving < counts.updated:
        return "True", reasons.NEW_REVISION, said
    return "True", reasons.SCALING, said


def _suspended(suspended: bool) -> Verdict:
    if suspended:
        return "True", reasons.SUSPENDED, "spec.suspend is true"
    return "False", reasons.NOT_SUSPENDED, "spec.suspend is false"


def _deadline(live: Mapping[str, Any]) -> bool:
    status = live.get("status") or {}
    if status.get("observedGeneration") != (live.get("metadata") or {}).get("generation"):
        return False  # what it says is about an earlier spec
    return any(
        each.get("type") == "Progressing" and each.get("reason") == reasons.DEADLINE
        for each in status.get("conditions") or ()
    )


def _group(pod: PodView, runner: RunnerView | None) -> GroupStatus:
    restarts = (pod.worker.restarts if pod.worker else 0) + (runner.restarts if runner else 0)
    if pod.deleting:
        state = "Draining"
    elif pod.phase == "Failed" or (pod.worker is not None and pod.worker.waiting == "CrashLoopBackOff"):
        state = "Failed"
    elif pod.ready:
        state = "Serving"
    elif runner is not None:
        state = _STATES.get(runner.state, "Starting") if runner.state != "ready" else "Starting"
    else:
        state = "Starting" if pod.node else "Pending"
    return GroupStatus(
        name=pod.name,
        pod_name=pod.name,
        node_name=pod.node,
        revision=pod.revision or None,
        ready_ranks=runner.ready_ranks if runner else None,
        world_size=runner.world_size if runner else None,
        restarts=restarts,
        state=state,
    )


def _last_failure(observed: Observed, previous: Mapping[str, Any]) -> LastFailure | None:
    """The newest failure that containers and runners report; an older one is kept for people to read."""
    found = [*_container_failures(observed.pods), *_rank_failures(observed.runners)]
    if old := previous.get("lastFailure"):
        found.append(
            LastFailure.model_validate({key: old[key] for key in old if key in _FAILURE_FIELDS}, by_name=False)
        )
    return max(found, key=lambda failure: failure.time or "", default=None)


_FAILURE_FIELDS: Final = {field.alias for field in LastFailure.model_fields.values()}


def _container_failures(pods: Sequence[PodView]) -> list[LastFailure]:
    return [
        LastFailure(
            pod_name=pod.name,
            rank=end.rank.rank if end.rank else None,
            exit_code=troubles.exit_code(end),
            signal=troubles.signal_name(end),
            reason=end.reason or "Error",
            message=_shortened(end.message or troubles.how(end)),
            time=end.at,
        )
        for pod in pods
        if pod.worker is not None and (end := pod.worker.failure)
    ]


def _rank_failures(runners: Mapping[str, RunnerView]) -> list[LastFailure]:
    return [
        LastFailure(
            pod_name=name,
            rank=failure.get("rank"),
            exit_code=failure.get("exitCode"),
            signal=troubles.name_of_signal(failure.get("signal")),
            reason=failure.get("reason"),
            message=_shortened(str(failure.get("message") or "")),
            time=datetime.fromtimestamp(failure.get("time") or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        for name, runner in runners.items()
        if (failure := runner.failure)
    ]


def _with_cure(reason: str, message: str) -> str:
    cure = reasons.CURES.get(reason)
    return f"{message} ({cure})" if cure else message


def _shortened(text: str) -> str:
    return text if len(text) <= MESSAGE_LIMIT else f"{text[: MESSAGE_LIMIT - 3]}..."


def _previous(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw.get("status") or {}
