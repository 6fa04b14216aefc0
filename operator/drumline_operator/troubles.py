"""What keeps an app's pods from serving: a pod's state -> one reason, with the words of whoever knows best. PURE."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from drumline_operator import reasons
from drumline_operator.machine_types import Machine
from drumline_operator.observe import MOUNT_WARNINGS, ContainerView, Ended, PodView, RunnerView

_PULL: Final = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
}
_CONFIG: Final = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
#: How a kubelet says that it ended a pod, or did not take it. ``OutOfcpu``, ``OutOfnvidia.com/gpu`` and the like are such, too.
_SHUTDOWN: Final = {"Terminated", "NodeShutdown", "Shutdown"}
_EVICTED: Final = {"Evicted", "Preempting"}
_NOT_TAKEN: Final = {
    "UnexpectedAdmissionError",
    "TopologyAffinityError",
    "NodeAffinity",
    "NodeName",
    "NodePorts",
    "NodeUnschedulable",
    "TaintToleration",
    "UnexpectedPredicateFailureType",
}
#: How the kubelet says that the runtime could not run the container's command at all.
_CANNOT_START: Final = {"StartError", "ContainerCannotRun"}
#: What drumline says about a workerClass that it cannot load; Python's own words begin with a capital letter.
_CLASS: Final = re.compile(
    r"has no class|no module named|is not a subclass of drumline|ConfigurationError: cannot import"
)
_BY_ERROR: Final = {
    "ConfigurationError": reasons.CONFIG_ERROR,
    "SetupFailed": reasons.SETUP_FAILED,
    "RankLost": reasons.RANK_FAILED,
    "WorkerError": reasons.RANK_FAILED,
    "RankHung": reasons.RANK_HUNG,
}
#: Which condition a reason belongs to; every other one is about the ranks.
_CONDITION: Final = {
    **dict.fromkeys(
        [reasons.INSUFFICIENT_GPUS, reasons.UNSCHEDULABLE, reasons.NO_MACHINE, reasons.QUOTA_EXCEEDED], "Scheduled"
    ),
    reasons.PODS_REFUSED: "Scheduled",
    **dict.fromkeys([reasons.GIT_FETCH_FAILED, reasons.IMAGE_PULL_FAILED, reasons.CLASS_NOT_FOUND], "SourceReady"),
    reasons.CONFIG_MAP_NOT_FOUND: "SourceReady",
}
_OVER: Final = {"Succeeded", "Failed"}
_WAITING: Final = {reasons.STARTING, reasons.LOADING_MODEL}


@dataclass(frozen=True)
class Trouble:
    """Why something is not ready. ``waiting``: nothing is wrong, it takes time."""

    reason: str
    message: str

    @property
    def condition(self) -> str:
        """The condition that this is about."""
        return _CONDITION.get(self.reason, "RanksReady")

    @property
    def waiting(self) -> bool:
        """Whether it passes by itself."""
        return self.reason in _WAITING


def worst(
    pods: Sequence[PodView], runners: Mapping[str, RunnerView], machine: Machine | None, resource: str
) -> Trouble | None:
    """Return the trouble to show: the first of a pod that is not ready, real trouble before waiting.

    What has become of a pod that is over counts until its successor's containers run: a node may refuse one after the other.
    """
    live = [pod for pod in pods if pod.phase not in _OVER]
    failed = [pod for pod in pods if pod.phase == "Failed"]
    shown = _first(live, runners, machine, resource)
    if failed and (not live or (shown is not None and shown.reason == reasons.STARTING)):
        return _first(failed[-1:], runners, machine, resource)
    return shown


def _first(
    pods: Sequence[PodView], runners: Mapping[str, RunnerView], machine: Machine | None, resource: str
) -> Trouble | None:
    found = [
        trouble
        for pod in pods
        if not pod.ready and not pod.deleting
        if (trouble := of_pod(pod, runners.get(pod.name), machine, resource))
    ]
    return min(found, key=lambda trouble: trouble.waiting, default=None)


def of_pod(pod: PodView, runner: RunnerView | None, machine: Machine | None, resource: str) -> Trouble | None:
    """Return why ``pod`` is not ready."""
    if pod.unschedulable:
        return _unscheduled(pod, machine, resource)
    if pod.phase == "Failed":
        return Trouble(
            _of_failed(pod), f"{pod.name}: {': '.join(filter(None, (pod.reason, pod.message))) or 'it failed'}"
        )
    if pod.warned is not None:
        reason = reasons.MOUNT_FAILED if pod.warned.reason in MOUNT_WARNINGS else reasons.SANDBOX_FAILED
        return Trouble(reason, f"{pod.name}: {pod.warned.message}")
    for container in (pod.source, pod.worker):
        if container is not None and (trouble := _of_waiting(pod, container)):
            return trouble
    if pod.source is not None and not pod.source.ready and (end := pod.source.failure):
        return Trouble(reasons.GIT_FETCH_FAILED, f"{pod.name}: {end.message or f'git ended with {end.exit_code}'}")
    if pod.worker is not None and (end := pod.worker.failure):
        return _of_end(pod, pod.worker, end)
    if pod.worker is not None and pod.worker.waiting == "CrashLoopBackOff":
        words = f"{pod.name}: the worker container ends by itself, with 0 ({pod.worker.restarts} restarts)"
        return Trouble(reasons.CRASH_LOOP, words)
    return _loading(pod, runner)


def _of_failed(pod: PodView) -> str:
    """A pod that is over is never tried again; its successor is another pod."""
    if pod.reason in _SHUTDOWN:
        return reasons.NODE_SHUTDOWN
    if pod.reason in _EVICTED:
        return reasons.EVICTED
    if pod.reason in _NOT_TAKEN or pod.reason.startswith("OutOf") or pod.message.startswith("Pod was rejected"):
        return reasons.REFUSED_BY_NODE
    return reasons.WORKER_EXITED


def _unscheduled(pod: PodView, machine: Machine | None, resource: str) -> Trouble:
    if machine is not None and machine.warning:
        reason = reasons.NO_MACHINE if " has 0 nodes" in machine.warning else reasons.INSUFFICIENT_GPUS
        return Trouble(reason, f"{machine.warning}; the scheduler says: {pod.unschedulable}")
    # Not one whose name only begins alike, such as nvidia.com/gpu.shared.
    short = re.search(rf"Insufficient {re.escape(resource)}(?![\w/-]|\.\w)", pod.unschedulable)
    return Trouble(reasons.INSUFFICIENT_GPUS if short else reasons.UNSCHEDULABLE, f"{pod.name}: {pod.unschedulable}")


def _of_waiting(pod: PodView, container: ContainerView) -> Trouble | None:
    if container.waiting in _PULL:
        return Trouble(reasons.IMAGE_PULL_FAILED, f"{pod.name}: {container.waiting_message or container.waiting}")
    if container.waiting in _CONFIG:
        return Trouble(reasons.CONFIG_ERROR, f"{pod.name}: {container.waiting_message or container.waiting}")
    return None


def _of_end(pod: PodView, worker: ContainerView, end: Ended) -> Trouble:
    said = end.message.splitlines()[0] if end.message else ""
    words = f"{pod.name}: {said or how(end)}"
    if end.reason == "OOMKilled":
        words = f"{pod.name}: the worker container used more memory than its limit"
        return Trouble(reasons.OUT_OF_MEMORY, f"{words}; {said}" if end.rank is not None else words)
    if _CLASS.search(said):
        return Trouble(reasons.CLASS_NOT_FOUND, words)
    if reason := _BY_ERROR.get(said.partition(":")[0]):
        return Trouble(reason, words)
    if end.reason in _CANNOT_START:
        return Trouble(reasons.CANNOT_START, words)
    if worker.waiting == "CrashLoopBackOff":
        return Trouble(reasons.CRASH_LOOP, f"{words} ({worker.restarts} restarts)")
    return Trouble(reasons.WORKER_EXITED, words)


def _loading(pod: PodView, runner: RunnerView | None) -> Trouble:
    if runner is None:
        waiting = pod.worker.waiting if pod.worker else ""
        return Trouble(reasons.STARTING, f"{pod.name}: {waiting or 'the container starts'}")
    progress = f"{pod.name}: {runner.ready_ranks} of {runner.world_size} ranks are ready"
    if runner.failure and runner.state in {"restarting", "failed"}:
        return Trouble(
            _BY_ERROR.get(str(runner.failure.get("reason")), reasons.RANK_FAILED),
            f"{progress}; {runner.failure.get('message') or runner.failure.get('reason')}",
        )
    return Trouble(reasons.LOADING_MODEL, progress)


def of_deployment(raw: Mapping[str, Any]) -> Trouble | None:
    """Return why the Deployment cannot make pods at all."""
    for each in (raw.get("status") or {}).get("conditions") or ():
        if each.get("type") == "ReplicaFailure" and each.get("status") == "True":
            message = each.get("message") or each.get("reason") or "pods cannot be made"
            quota = "exceeded quota" in message
            return Trouble(reasons.QUOTA_EXCEEDED if quota else reasons.PODS_REFUSED, message)
    return None


def how(end: Ended) -> str:
    """Return how a container ended, in words."""
    if name := signal_name(end):
        return f"the worker container was ended by {name}"
    return f"the worker container exited with {end.exit_code}"


def signal_name(end: Ended) -> str | None:
    """Return the name of the signal that ended a rank or its container, also where only the exit code tells it."""
    if end.rank is not None and end.rank.signal is not None:
        return name_of_signal(end.rank.signal)
    number = end.signal or (end.exit_code - 128 if end.exit_code > 128 else 0)
    return name_of_signal(number)


def exit_code(end: Ended) -> int | None:
    """Return the exit code of the rank to blame, else the container's; None when a signal ended the rank."""
    rank = end.rank
    return rank.exit_code if rank is not None and (rank.signal, rank.exit_code) != (None, None) else end.exit_code


def name_of_signal(number: int | None) -> str | None:
    """Return e.g. SIGKILL for 9."""
    try:
        return signal.Signals(number).name if number else None
    except ValueError:
        return None
