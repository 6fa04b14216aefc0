"""What an app's status says: each trouble has its reason, and the words of whoever knows best."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from drumline.api.status import APP_CONDITIONS, GROUPS_LIMIT
from drumline.errors import ConfigurationError, DrumlineError, NotReady, RankLost, SetupFailed
from drumline.host import write_termination_log
from drumline_operator import reasons
from drumline_operator.actions import Action, Apply, Delete, Event, RequeueAfter, SetStatus
from drumline_operator.machine_status import machine_status
from drumline_operator.machine_types import Machine, NoMachine, resolve
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.observe import (
    NodeView,
    Observed,
    RunnerView,
    SourceView,
    Warned,
    node_view,
    pod_views,
    runner_view,
    warned,
)
from drumline_operator.plan import plan, validated
from drumline_operator.settings import OperatorSettings

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SETTINGS = OperatorSettings()


def app(status: Any = None, generation: int = 3, **spec: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "sdxl", "namespace": "ml", "uid": "u1", "generation": generation},
        "spec": {"image": "a:1", "workerClass": "app:W", "numGPUs": 2, **spec},
    }
    return {**raw, "status": status} if status else raw


def children(raw: dict[str, Any], **status: Any) -> dict[str, Any]:
    """What the operator makes of ``raw``, as the API server has it."""
    applied = [action.manifest for action in plan(raw, Observed(), NOW) if isinstance(action, Apply)]
    found: dict[str, Any] = {each["kind"]: json.loads(json.dumps(each)) for each in applied}
    found["Deployment"]["metadata"]["generation"] = 1
    found["Deployment"]["status"] = {"observedGeneration": 1, **status}
    return found


def revision(raw: dict[str, Any]) -> str:
    found: str = written(plan(raw, Observed(), NOW))["updateRevision"]
    return found


def pod(raw: dict[str, Any], name: str = "sdxl-1", *, ready: bool = False, **changes: Any) -> dict[str, Any]:
    worker = {
        "name": "worker",
        "ready": ready,
        "restartCount": 0,
        "state": {"running": {}},
        **changes.pop("worker", {}),
    }
    status = {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "conditions": [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [worker],
        **changes.pop("status", {}),
    }
    labels = {"drumline.dev/revision": changes.pop("revision", None) or revision(raw)}
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": labels,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            **changes,
        },
        "spec": {"nodeName": "n1"},
        "status": status,
    }


def written(actions: tuple[Action, ...]) -> dict[str, Any]:
    (found,) = [action for action in actions if isinstance(action, SetStatus)]
    return dict(found.status)


def conditions(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["type"]: each for each in status["conditions"]}


def judge(raw: dict[str, Any], *pods: dict[str, Any], **observed: Any) -> dict[str, Any]:
    known = {"children": children(raw), "pods": pod_views(pods), **observed}
    return written(plan(raw, Observed(**known), NOW, SETTINGS))


def ended(code: int, message: str = "", reason: str = "Error", **rest: Any) -> dict[str, Any]:
    return {
        "terminated": {
            "exitCode": code,
            "message": message,
            "reason": reason,
            "finishedAt": "2026-01-01T11:00:00Z",
            **rest,
        }
    }


UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."


def pending(message: str = UNSCHEDULABLE) -> dict[str, Any]:
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "podIP": None, "conditions": [scheduled], "containerStatuses": []}


def failed(reason: str, message: str, ours: str) -> tuple[dict[str, Any], str, str, str]:
    """A pod that is over, as kubelets leave it."""
    status = {"phase": "Failed", "reason": reason, "message": message, "containerStatuses": []}
    return {"status": status}, "RanksReady", ours, f"{reason}: {message}"


WAITING = {"ready": False, "restartCount": 4}
TROUBLES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no GPUs": ({"status": pending()}, "Scheduled", "InsufficientGPUs", UNSCHEDULABLE),
    "no memory": ({"status": pending("0/3 nodes: 3 Insufficient memory.")}, "Scheduled", "Unschedulable", "memory"),
    "image": (
        {"worker": {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling a:1"}}}},
        "SourceReady",
        "ImagePullFailed",
        "Back-off pulling a:1",
    ),
    "secret": (
        {"worker": {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "t" not found'}}}},
        "RanksReady",
        "ConfigError",
        'secret "t" not found',
    ),
    "git": (
        {
            "status": {
                "phase": "Pending",
                "containerStatuses": [],
                "initContainerStatuses": [
                    {
                        "name": "source",
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": ended(128, "fatal: couldn't find remote ref v9"),
                    }
                ],
            }
        },
        "SourceReady",
        "GitFetchFailed",
        "couldn't find remote ref v9",
    ),
    "class": (
        {"worker": {"state": ended(2, "ConfigurationError: app.py has no class 'W'; it has Worker")}},
        "SourceReady",
        "ClassNotFound",
        "it has Worker",
    ),
    "module": (
        {"worker": {"state": ended(2, "ConfigurationError: app:W: no module named 'app' on the search path")}},
        "SourceReady",
        "ClassNotFound",
        "no module named 'app'",
    ),
    "setting": (
        {"worker": {"state": ended(2, "ConfigurationError: DRUMLINE_PORT: 'x' is not JSON")}},
        "RanksReady",
        "ConfigError",
        "DRUMLINE_PORT",
    ),
    "setup": (
        {"worker": {"lastState": ended(1, "SetupFailed: rank 1: ModuleNotFoundError: No module named 'x'\nTraceback")}},
        "RanksReady",
        "SetupFailed",
        "No module named 'x'",
    ),
    "memory": (
        {"worker": {"lastState": ended(137, reason="OOMKilled")}},
        "RanksReady",
        "OutOfMemory",
        "more memory than its limit",
    ),
    "rank": (
        {"worker": {"state": ended(1, "RankLost: rank 3 was killed by SIGSEGV")}},
        "RanksReady",
        "RankFailed",
        "SIGSEGV",
    ),
    "crash": (
        {"worker": {**WAITING, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended(139)}},
        "RanksReady",
        "CrashLoop",
        "SIGSEGV (4 restarts)",
    ),
    "crash without an error": (
        {
            "worker": {
                **WAITING,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": ended(0, "", "Completed"),
            }
        },
        "RanksReady",
        "CrashLoop",
        "ends by itself, with 0 (4 restarts)",
    ),
    "no drumline in the image": (
        {
            "worker": {
                **WAITING,
                "state": {
                    "waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}
                },
                "lastState": ended(
                    128,
                    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create "
                    'failed: unable to start container process: exec: "drumline": executable file not found in $PATH',
                    "StartError",
                ),
            }
        },
        "RanksReady",
        "ContainerCannotStart",
        'exec: "drumline": executable file not found',
    ),
    "another kind of GPU": (
        {"status": pending("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.shared.")},
        "Scheduled",
        "Unschedulable",
        "gpu.shared",
    ),
    "exit": ({"worker": {"state": ended(7)}}, "RanksReady", "WorkerExited", "exited with 7"),
    "eviction": failed("Evicted", "The node was low on resource: memory.", "Evicted"),
    "preempted by the kubelet": failed("Preempting", "Preempted in order to admit critical pod", "Evicted"),
    "devices": failed(
        "UnexpectedAdmissionError",
        "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy devices "
        "nvidia.com/gpu, which is unexpected",
        "RefusedByNode",
    ),
    "GPUs that others have": failed("OutOfnvidia.com/gpu", "Node didn't have enough resource", "RefusedByNode"),
    "an older kubelet's words": failed("Odd", "Pod was rejected: for whatever reason", "RefusedByNode"),
    "shutdown": failed("Terminated", "Pod was terminated in response to imminent node shutdown.", "NodeShutdown"),
    "while it shuts down": failed("NodeShutdown", "Pod was rejected as the node is shutting down.", "NodeShutdown"),
    "failed for another reason": failed("Odd", "who knows", "WorkerExited"),
}


@pytest.mark.parametrize("name", sorted(TROUBLES))
def test_each_trouble_has_its_reason(name: str) -> None:
    changes, condition, reason, words = TROUBLES[name]
    raw = app()
    status = judge(raw, pod(raw, **changes))
    found = conditions(status)
    assert tuple(found) == APP_CONDITIONS
    for type in ("Ready", condition):
        assert (found[type]["status"], found[type]["reason"]) == ("False", reason), type
        assert words in found[type]["message"]
        assert reasons.CURES[reason] in found[type]["message"]
    assert found["RanksReady"]["status"] == "False"
    assert found["Failed"]["status"] == "False"
    assert {each["observedGeneration"] for each in found.values()} == {3}


def test_an_evicted_pod_does_not_count() -> None:
    raw = app()
    status = judge(raw, pod(raw, **TROUBLES["eviction"][0]), pod(raw, "sdxl-2", ready=True))
    assert conditions(status)["Ready"]["reason"] == "Serving"
    assert conditions(status)["RanksReady"]["status"] == "True"
    assert [group["state"] for group in status["groups"]] == ["Serving", "Failed"]


def test_many_pods_that_failed_hide_none_that_lives() -> None:
    raw = app()
    over = [pod(raw, f"sdxl-{number}", **TROUBLES["devices"][0]) for number in range(GROUPS_LIMIT + 1)]
    status = judge(raw, *over, pod(raw, "sdxl-z", ready=True))
    assert len(status["groups"]) == GROUPS_LIMIT
    assert status["groups"][0]["state"] == "Serving"


@pytest.mark.parametrize(
    ("successor", "reason"),
    [
        ({"status": {"phase": "Pending", "containerStatuses": []}}, "RefusedByNode"),
        ({"worker": {"state": {"waiting": {"reason": "ContainerCreating"}}}}, "RefusedByNode"),
        ({"status": pending()}, "InsufficientGPUs"),
        ({"worker": {"state": ended(7)}}, "WorkerExited"),
    ],
    ids=["new", "begins", "without a node", "runs"],
)
def test_what_became_of_a_pod_is_told_until_its_successor_runs(successor: dict[str, Any], reason: str) -> None:
    raw = app()
    status = judge(raw, pod(raw, **TROUBLES["devices"][0]), pod(raw, "sdxl-2", **successor))
    assert conditions(status)["Ready"]["reason"] == reason


def test_a_pod_of_an_older_revision_that_failed_is_no_trouble_of_the_new_one() -> None:
    raw = app()
    status = judge(raw, pod(raw, revision="old", **TROUBLES["eviction"][0]))
    assert conditions(status)["Ready"]["reason"] == "Starting"


BEGINS = {"phase": "Pending", "containerStatuses": [], "conditions": [{"type": "PodScheduled", "status": "True"}]}


def event(reason: str, message: str, **times: Any) -> dict[str, Any]:
    metadata = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": metadata, "reason": reason, "message": message, **times}


def test_the_newest_warning_counts() -> None:
    old = event("FailedMount", "old", lastTimestamp="2026-01-01T00:00:05Z")
    new = event("FailedCreatePodSandBox", "new", series={"lastObservedTime": "2026-01-01T00:00:06.000000Z"})
    other = event("BackOff", "other", lastTimestamp="2026-01-01T00:00:07Z")
    bare = event("FailedMount", "bare", eventTime=None)
    assert warned([old, new, other, bare]) == Warned("FailedCreatePodSandBox", "new")
    assert warned([bare]) == Warned("FailedMount", "bare")
    assert warned([other]) is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("FailedMount", "MountFailed"),
        ("FailedAttachVolume", "MountFailed"),
        ("FailedCreatePodSandBox", "SandboxFailed"),
    ],
)
def test_why_a_pod_does_not_begin(found: str, reason: str) -> None:
    raw = app()
    (view,) = pod_views([pod(raw, status=BEGINS)])
    assert view.begins
    words = 'MountVolume.SetUp failed for volume "credentials" : secret "git" not found'
    observed = Observed(children(raw), (replace(view, warned=Warned(found, words)),))
    actions = plan(raw, observed, NOW, SETTINGS)
    ready = conditions(written(actions))["Ready"]
    assert (ready["status"], ready["reason"]) == ("False", reason)
    assert words in ready["message"]
    assert reasons.CURES[reason] in ready["message"]
    # Made twelve hours ago: it is looked at ever less often.
    assert [each for each in actions if isinstance(each, RequeueAfter)] == [RequeueAfter(6 * 3600)]


@pytest.mark.parametrize(
    "changes",
    [
        {"status": {**BEGINS, "conditions": [{"type": "PodReadyToStartContainers", "status": "True"}]}},
        {"worker": {"state": {"waiting": {"reason": "ImagePullBackOff"}}}, "status": {"phase": "Pending"}},
        {"worker": {"state": ended(1)}, "status": {"phase": "Pending"}},
        {"status": {"phase": "Failed", "containerStatuses": []}},
        {},
    ],
    ids=["has a sandbox", "pulls", "ended", "failed", "runs"],
)
def test_pods_that_have_begun(changes: dict[str, Any]) -> None:
    (view,) = pod_views([pod(app(), **changes)])
    assert not view.begins


def test_serving() -> None:
    raw = app(replicas=2)
    runners = {name: RunnerView("ready", 2, 2, restarts=n) for n, name in enumerate(["sdxl-1", "sdxl-2"])}
    status = judge(raw, pod(raw, ready=True), pod(raw, "sdxl-2", ready=True), runners=runners)
    found = conditions(status)
    assert {type: each["status"] for type, each in found.items()} == {
        "Ready": "True",
        "Available": "True",
        "Progressing": "False",
        "Scheduled": "True",
        "SourceReady": "True",
        "RanksReady": "True",
        "Suspended": "False",
        "Failed": "False",
    }
    assert (status["summary"], status["replicas"], status["groupRestarts"]) == ("2/2", 2, 1)
    assert status["url"] == "http://sdxl.ml.svc.cluster.local:8080"
    assert status["selector"] == "drumline.dev/app=sdxl"
    assert status["observedGeneration"] == 3
    assert status["groups"][0] == {
        "name": "sdxl-1",
        "podName": "sdxl-1",
        "nodeName": "n1",
        "revision": revision(raw),
        "readyRanks": 2,
        "worldSize": 2,
        "restarts": 0,
        "state": "Serving",
    }


def test_ranks_that_load_are_counted() -> None:
    raw = app()
    actions = plan(
        raw,
        Observed(children(raw), pod_views([pod(raw)]), runners={"sdxl-1": RunnerView("starting", 2, 1)}),
        NOW,
        SETTINGS,
    )
    found = conditions(written(actions))
    assert found["Ready"]["reason"] == found["RanksReady"]["reason"] == "LoadingModel"
    assert "1 of 2 ranks are ready" in found["RanksReady"]["message"]
    assert found["Scheduled"]["status"] == "True"
    assert not any(isinstance(each, RequeueAfter) for each in actions)  # the runner will tell


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("RankLost", "RankFailed"), ("RankHung", "RankHung"), ("SetupFailed", "SetupFailed"), ("Odd", "RankFailed")],
)
def test_the_last_failure_of_a_rank(kind: str, reason: str) -> None:
    raw = app()
    failure = {"reason": kind, "message": "rank 1 is gone", "rank": 1, "signal": 9, "time": 1767268800.0}
    status = judge(raw, pod(raw), runners={"sdxl-1": RunnerView("restarting", 2, 0, 1, failure)})
    assert conditions(status)["Ready"]["reason"] == reason
    assert status["lastFailure"] == {
        "podName": "sdxl-1",
        "rank": 1,
        "signal": "SIGKILL",
        "reason": kind,
        "message": "rank 1 is gone",
        "time": "2026-01-01T12:00:00Z",
    }


@pytest.mark.parametrize(
    ("error", "rank", "code", "name"),
    [
        (NotReady("the group failed", failure={"reason": "Killed", "rank": 1, "signal": 9}), 1, None, "SIGKILL"),
        (RankLost(1, exit_code=3), 1, 3, None),
        (SetupFailed("no weights", rank=1, remote_traceback="Traceback"), 1, 1, None),
        (ConfigurationError("no such class"), None, 1, None),
    ],
)
def test_the_rank_to_blame_is_in_the_termination_message(
    tmp_path: Path, error: DrumlineError, rank: int | None, code: int | None, name: str | None
) -> None:
    """As the worker leaves it, and the kubelet shows it when the kernel has ended a rank."""
    log = tmp_path / "log"
    log.touch()
    write_termination_log(error, log)
    raw = app()
    status = judge(raw, pod(raw, worker={"lastState": ended(1, log.read_text(), "OOMKilled")}))
    failure = status["lastFailure"]
    assert failure["reason"] == "OOMKilled"
    assert (failure.get("rank"), failure.get("exitCode"), failure.get("signal")) == (rank, code, name)
    assert failure["message"].startswith(f"{type(error).__name__}: ")
    assert "{" not in failure["message"]
    assert conditions(status)["Ready"]["reason"] == "OutOfMemory"


@pytest.mark.parametrize(
    "text", ["{}", "1", '["x"]', '{"rank": "one"}', '{"rank": true}', "words\n{", '{"rank": null}']
)
def test_a_termination_message_that_is_not_ours_stays_as_it_is(text: str) -> None:
    raw = app()
    failure = judge(raw, pod(raw, worker={"state": ended(137, text)}))["lastFailure"]
    assert (failure["message"], failure["exitCode"], failure["signal"], failure.get("rank")) == (
        text,
        137,
        "SIGKILL",
        None,
    )


def test_the_last_failure_of_a_container_outlives_the_pod() -> None:
    raw = app()
    status = judge(raw, pod(raw, worker={"state": ended(137, "x" * 9000)}))
    failure = status["lastFailure"]
    assert (failure["exitCode"], failure["signal"], failure["time"]) == (137, "SIGKILL", "2026-01-01T11:00:00Z")
    assert len(failure["message"]) == 4096
    later = judge({**raw, "status": status}, pod(raw, "sdxl-2", ready=True))
    assert later["lastFailure"] == failure


def test_times_change_only_with_the_verdict() -> None:
    raw = app()
    first = judge(raw, pod(raw))
    observed = Observed(children(raw), pod_views([pod(raw, worker={"state": ended(7)})]))
    second = written(plan({**raw, "status": first}, observed, NOW + timedelta(hours=1)))
    old, new = conditions(first), conditions(second)
    assert old["Ready"]["reason"] != new["Ready"]["reason"]
    assert old["Ready"]["lastTransitionTime"] == new["Ready"]["lastTransitionTime"] == "2026-01-01T12:00:00Z"
    served = Observed(children(raw), pod_views([pod(raw, ready=True)]))
    third = conditions(written(plan({**raw, "status": second}, served, NOW + timedelta(hours=2))))
    assert third["Ready"]["lastTransitionTime"] == "2026-01-01T14:00:00Z"
    assert third["Suspended"]["lastTransitionTime"] == "2026-01-01T12:00:00Z"


def test_a_new_generation_is_judged_though_nothing_else_changed() -> None:
    raw = app()
    served = Observed(children(raw), pod_views([pod(raw, ready=True)]))
    status = written(plan(raw, served, NOW))
    assert plan({**raw, "status": status}, served, NOW) == ()
    newer = app(status=status, generation=4)
    (action,) = plan(newer, served, NOW)
    assert isinstance(action, SetStatus)
    assert {each["observedGeneration"] for each in action.status["conditions"]} == {4}


def test_events_tell_what_changed() -> None:
    raw = app()
    actions = plan(raw, Observed(), NOW)
    assert [each.manifest["kind"] for each in actions if isinstance(each, Apply)] == [
        kind for kind in API_VERSIONS if kind != "NetworkPolicy"
    ]
    assert Event("Normal", "Created", "Service, PodDisruptionBudget, Deployment made") in actions
    seen = Observed(children(raw), pod_views([pod(raw, status=pending())]))
    event = next(each for each in plan(raw, seen, NOW) if isinstance(each, Event))
    assert (event.type, event.reason) == ("Warning", "InsufficientGPUs")
    assert UNSCHEDULABLE in event.message


def test_suspended_and_scaled_to_zero() -> None:
    for spec, status, reason in (
        ({"suspend": True}, "False", "Suspended"),
        ({"replicas": 0}, "True", "ScaledToZero"),
    ):
        found = conditions(judge(app(**spec)))
        assert (found["Ready"]["status"], found["Ready"]["reason"]) == (status, reason)
        assert found["Progressing"]["reason"] == "Complete"
        # An apply that removes the last group leaves no list: a status with an empty one would be written twice.
        assert "groups" not in judge(app(**spec))
    assert conditions(judge(app(suspend=True)))["Suspended"]["status"] == "True"


def test_pods_that_the_server_refuses() -> None:
    raw = app()
    for message, reason in (
        ('pods "x" is forbidden: exceeded quota: gpus, requested: nvidia.com/gpu=2', "QuotaExceeded"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "PodsRefused"),
    ):
        failed = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
        found = conditions(judge(raw, children=children(raw, conditions=[failed])))
        assert (found["Scheduled"]["status"], found["Scheduled"]["reason"]) == ("False", reason)
        assert message in found["Ready"]["message"]


def test_a_rollout_that_is_late_has_failed() -> None:
    raw = app()
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    found = conditions(judge(raw, pod(raw), children=children(raw, conditions=[late])))
    assert (found["Failed"]["status"], found["Failed"]["reason"]) == ("True", "ProgressDeadlineExceeded")
    assert found["Progressing"]["reason"] == "ProgressDeadlineExceeded"
    served = conditions(judge(raw, pod(raw, ready=True), children=children(raw, conditions=[late])))
    assert served["Failed"]["status"] == "False"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"image": None}, "spec.image is missing; set spec.image"),
        ({"image": None, "source": {"configMap": {"name": "c"}}}, "this operator has no image for sources"),
        ({"numGPUs": -1}, "spec.numGPUs"),
        ({"num_gpus": 1}, "spec.num_gpus"),
        ({"rollout": {"type": "Recreate", "maxSurge": 1}}, "maxSurge and maxUnavailable do not apply"),
        ({"env": [{"name": "DRUMLINE_PORTS", "value": "1"}]}, "DRUMLINE_PORTS: no such setting"),
    ],
)
def test_a_wrong_spec_is_named_and_nothing_is_touched(spec: dict[str, Any], words: str) -> None:
    raw = app(status={"url": "http://kept"}, **spec)
    actions = plan(raw, Observed(), NOW)
    assert {type(each) for each in actions} == {Event, SetStatus}
    status = written(actions)
    found = conditions(status)
    assert (found["Ready"]["status"], found["Ready"]["reason"]) == ("False", "InvalidSpec")
    assert words in found["Ready"]["message"]
    assert found["Failed"]["status"] == "True"
    assert status["url"] == "http://kept"
    assert plan({**raw, "status": status}, Observed(), NOW) == ()


def test_a_name_that_is_taken() -> None:
    raw = app()
    service = {"kind": "Service", "metadata": {"name": "sdxl", "uid": "s"}}
    found = conditions(judge(raw, children={"Service": service}))
    assert found["Ready"]["reason"] == "NameTaken"
    assert "Service sdxl" in found["Ready"]["message"]
    # Nobody watches other people's objects.
    assert RequeueAfter(SETTINGS.progress_interval) in plan(raw, Observed({"Service": service}), NOW, SETTINGS)


def test_what_an_earlier_app_left_is_waited_for() -> None:
    raw = app()
    left = children({**raw, "metadata": {**raw["metadata"], "uid": "u0"}})
    actions = plan(raw, Observed(left), NOW)
    assert not [each for each in actions if isinstance(each, Apply | Delete)]
    assert any(isinstance(each, RequeueAfter) for each in actions)


def test_apps_on_their_way_out_are_left_alone() -> None:
    raw = app()
    raw["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert plan(raw, Observed(), NOW) == ()


def test_sources_in_config_maps() -> None:
    raw = app(source={"configMap": {"name": "code"}})
    missing = plan(raw, Observed(source=SourceView(exists=False)), NOW)
    assert not [each for each in missing if isinstance(each, Apply)]
    found = conditions(written(missing))
    assert (found["SourceReady"]["status"], found["SourceReady"]["reason"]) == ("False", "ConfigMapNotFound")
    assert "there is no ConfigMap code" in found["Ready"]["message"]
    one, two = (written(plan(raw, Observed(source=SourceView(True, digest)), NOW)) for digest in ("a", "b"))
    assert one["updateRevision"] != two["updateRevision"]


def test_broken_pods_are_replaced_when_asked_for() -> None:
    crashed = {"worker": {**WAITING, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended(1)}}
    for policy, wanted in (("RecreatePod", ["sdxl-1"]), ("RestartGroup", [])):
        raw = app(failurePolicy={"type": policy})
        actions = plan(raw, Observed(children(raw), pod_views([pod(raw, **crashed)])), NOW)
        assert [each.uid for each in actions if isinstance(each, Delete)] == wanted


# --- machine types

H100 = {"metadata": {"name": "h100"}, "spec": {"nodeSelector": {"gpu": "h100"}, "aliases": ["GPU-H100"]}}


def node(gpus: int, **labels: str) -> NodeView:
    conditions = [{"type": "Ready", "status": "True"}]
    return node_view(
        {
            "metadata": {"name": "n", "labels": labels},
            "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}, "conditions": conditions},
        }
    )


def machine_for(wanted: str | None, *types: dict[str, Any], nodes: Any = None, **spec: Any) -> Any:
    return resolve(validated(app(machineType=wanted, **spec), SETTINGS).spec, types or [H100], nodes)


@pytest.mark.parametrize("name", ["h100", "GPU-H100"])
def test_a_machine_has_names_and_aliases(name: str) -> None:
    found = machine_for(name, nodes=[node(8, gpu="h100")])
    assert isinstance(found, Machine)
    assert (found.name, found.warning) == ("h100", "")


def test_no_machine_is_wanted() -> None:
    assert machine_for(None) is None


@pytest.mark.parametrize(
    ("wanted", "types", "spec", "words"),
    [
        ("GPU-H10", [H100], {}, "did you mean 'GPU-H100'"),
        ("tpu", [H100], {}, "known are GPU-H100, h100"),
        ("GPU-H100", [H100, {**H100, "metadata": {"name": "x"}}], {}, "an alias of h100 and x"),
        ("h100", [H100], {"numGPUs": 16}, "16 is more than one h100 has (8)"),
        ("h100", [{**H100, "spec": {"gpusPerNode": "8"}}], {}, "spec.gpusPerNode"),
    ],
)
def test_machines_that_do_not_fit(wanted: str, types: list[Any], spec: dict[str, Any], words: str) -> None:
    found = machine_for(wanted, *types, **spec)
    assert isinstance(found, NoMachine)
    assert words in found.message
    raw = app(machineType=wanted, **spec)
    actions = plan(raw, Observed(machine_types=tuple(types)), NOW)
    assert not [each for each in actions if isinstance(each, Apply)]
    scheduled = conditions(written(actions))["Scheduled"]
    assert (scheduled["status"], scheduled["reason"]) == ("False", "NoMatchingMachineType")


@pytest.mark.parametrize(
    ("nodes", "reason", "words"),
    [
        ([], "NoMatchingMachineType", "h100 has 0 nodes (label gpu=h100)"),
        ([node(8)], "NoMatchingMachineType", "h100 has 0 nodes"),
        ([node(1, gpu="h100")], "InsufficientGPUs", "h100 has 1 nodes, none with 2 nvidia.com/gpu (at most 1)"),
        ([node(8, gpu="h100")], "InsufficientGPUs", UNSCHEDULABLE),
    ],
)
def test_a_pod_that_waits_for_a_machine(nodes: list[NodeView], reason: str, words: str) -> None:
    raw = app(machineType="GPU-H100")
    known = {"machine_types": (H100,), "nodes": tuple(nodes)}
    first = written(plan(raw, Observed(**known), NOW))
    waiting = pod_views([pod(raw, status=pending(), revision=first["updateRevision"])])
    found = conditions(written(plan(raw, Observed(pods=waiting, **known), NOW)))
    assert (found["Scheduled"]["reason"], found["Ready"]["reason"]) == (reason, reason)
    assert words in found["Scheduled"]["message"]
    assert UNSCHEDULABLE in found["Scheduled"]["message"]


def test_the_status_of_a_machine_type() -> None:
    raw = {**H100, "metadata": {"name": "h100", "generation": 2}}
    cordoned = node_view({"metadata": {"name": "c", "labels": {"gpu": "h100"}}, "spec": {"unschedulable": True}})
    status = machine_status(raw, [node(8, gpu="h100"), node(4, gpu="h100"), node(8), cordoned], NOW)
    assert (status["nodes"], status["allocatableGPUs"], status["observedGeneration"]) == (2, 12, 2)
    assert conditions(status)["Available"]["status"] == "True"
    none = machine_status(raw, [], NOW)
    assert (none["nodes"], conditions(none)["Available"]["reason"]) == (0, "NoNodes")
    assert conditions(machine_status(raw, None, NOW))["Available"]["status"] == "Unknown"
    assert conditions(machine_status({**raw, "spec": {"x": 1}}, [], NOW))["Available"]["reason"] == "InvalidSpec"


def test_a_runner_says_something_else() -> None:
    body = {"state": "ready", "worldSize": 2, "readyRanks": 2, "restarts": 0, "lastFailure": None, "more": 1}
    assert runner_view(body) == RunnerView("ready", 2, 2)
    for wrong in ({}, {"state": "ready"}, {**body, "worldSize": "two"}):
        assert runner_view(wrong) is None


def test_every_trouble_has_a_cure() -> None:
    said = {reason for _, _, reason, _ in TROUBLES.values()}
    assert said <= reasons.CURES.keys()


MACHINE = {"metadata": {"name": "h100"}, "spec": {"gpusPerNode": 8, "nodeSelector": {"gpu": "h100"}}}


def made_of(raw: dict[str, Any], observed: Observed) -> dict[str, Any]:
    """The manifests that a plan applies, by kind."""
    actions = plan(raw, observed, NOW)
    return {each.manifest["kind"]: json.loads(json.dumps(each.manifest)) for each in actions if isinstance(each, Apply)}


@pytest.mark.parametrize("change", [{"suspend": True}, {"replicas": 1}])
@pytest.mark.parametrize("lost", ["machine type", "ConfigMap"])
def test_an_app_that_is_blocked_can_be_suspended_and_scaled(lost: str, change: dict[str, Any]) -> None:
    """Its pods stay what they are, though nobody could build new ones."""
    spec = {"replicas": 3, "machineType": "h100", "source": {"configMap": {"name": "code"}}}
    known: dict[str, Any] = {"machine_types": (MACHINE,), "source": SourceView(exists=True, digest="1")}
    made = made_of(app(**spec), Observed(**known))
    without = {"machine_types": ()} if lost == "machine type" else {"source": SourceView(exists=False)}
    observed = Observed(children=made, **(known | without))
    assert made_of(app(**spec), observed) == {}
    changed = made_of(app(**(spec | change)), observed)
    wanted = json.loads(json.dumps(made["Deployment"]))
    wanted["spec"]["replicas"] = 0 if "suspend" in change else 1
    assert changed == {"Deployment": wanted}


def test_a_blocked_app_repairs_what_it_knows() -> None:
    raw = app(machineType="h100")
    made = made_of(raw, Observed(machine_types=(MACHINE,)))
    made["Deployment"]["metadata"]["annotations"] = {}  # nobody knows any more what its pods were made from
    del made["Service"]
    assert list(made_of(raw, Observed(children=made))) == ["Service"]
    assert made_of(raw, Observed()) == {}
