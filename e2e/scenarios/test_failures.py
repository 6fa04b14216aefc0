"""Something dies in the middle of a stream: who is told what, and what comes back by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from e2e.cluster.layout import NODE_LABEL
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import Kube, Object, condition

HOLD = {"hold": True}


def worker_status(pod: Object) -> Object:
    found: Object = next(each for each in pod["status"]["containerStatuses"] if each["name"] == "worker")
    return found


def last_failure(app: App, **expected: Any) -> Object:
    """Wait until status.lastFailure has these members; the app."""

    def done(item: Object) -> bool:
        found = item.get("status", {}).get("lastFailure", {})
        return expected.items() <= found.items()

    return app.kube.until("dapp", app.name, done, f"lastFailure is {expected}")


def test_a_killed_rank_is_named_and_its_group_restarted(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("rank"))
    app.ready()
    before = app.pod()
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    waiting = client.background(f"curl -sS --data '{{}}' {app.url}/")
    status = client.call(f"{app.url}/status").body
    assert [rank["state"] for rank in status["ranks"]] == ["busy", "busy"]
    app.execute(before["metadata"]["name"], "sh", "-c", f"kill -KILL {status['ranks'][1]['pid']}")

    problem = stream.error()
    assert problem["type"].endswith("/rank-lost")
    assert (problem["rank"], problem["signal"]) == (1, 9)
    assert json.loads(waiting.line())["ranks"] == 2, "who waited is served by the new group"
    name = before["metadata"]["name"]
    last_failure(app, podName=name, rank=1, signal="SIGKILL", reason="Killed")
    kube.until("dapp", app.name, lambda item: item["status"].get("groupRestarts") == 1, "the group is restarted once")
    app.ready()
    assert app.pod()["metadata"]["uid"] == before["metadata"]["uid"]
    assert worker_status(app.pod())["restartCount"] == 0


def test_a_killed_runner_takes_its_container_with_it(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("runner"))
    app.ready()
    before = app.pod()
    name = before["metadata"]["name"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    # The runner is the child of the container's first process, which only reaps and forwards signals.
    app.execute(name, "sh", "-c", "kill -KILL $(cut -d ' ' -f 1 /proc/1/task/1/children)")

    stream.broken()
    last_failure(app, podName=name, exitCode=137, signal="SIGKILL")
    kube.until("pod", name, lambda pod: worker_status(pod)["restartCount"] == 1, "the container is started again")
    app.ready()
    assert client.call(app.url, {}).body["pod"] == name


def test_a_lost_pod_is_replaced(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("pod"))
    app.ready()
    lost = app.pod()["metadata"]["name"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    kube("delete", "pod", lost, "--grace-period=0", "--force")

    stream.broken()
    kube.until_all("pod", lambda pods: pods and lost not in pods, "a new pod is made", selector=app.labels)
    app.ready()
    client.call_until(app.url, {}, "pod", app.pod()["metadata"]["name"])


def test_a_deleted_pod_finishes_its_stream_first(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("drains"))
    app.ready()
    old = app.pod()["metadata"]["name"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    kube("delete", "pod", old, "--wait=false")
    kube.until(
        "dapp",
        app.name,
        lambda item: {"Draining", "Serving"} == {group["state"] for group in item["status"].get("groups", ())},
        "the old pod drains while the new one serves",
    )
    client.call_until(app.url, {}, "pod", app.pod()["metadata"]["name"])
    stream.take(3)
    app.release(old)

    assert stream.result()["pod"] == old
    kube("wait", "--for=delete", f"pod/{old}", "--timeout=180s")


TROUBLES = {
    "no-class": (
        apps.app("no-class", "Stepps"),
        "SourceReady",
        "ClassNotFound",
        "worker_code.py has no class 'Stepps'; did you mean 'Steps'?",
    ),
    "setup": (apps.app("setup", "BadSetup"), "RanksReady", "SetupFailed", "the weights are not there"),
    "memory": (
        apps.app("memory", "Hungry", resources={"requests": {"memory": "128Mi"}, "limits": {"memory": "1500Mi"}}),
        "RanksReady",
        "OutOfMemory",
        "more memory than its limit",
    ),
    "image": (
        apps.app("image", image="localhost/drumline/nothing:1", imagePullPolicy="IfNotPresent"),
        "SourceReady",
        "ImagePullFailed",
        "localhost/drumline/nothing:1",
    ),
    "secret": (
        apps.app("secret", envFrom=[{"secretRef": {"name": "tokens"}}]),
        "RanksReady",
        "ConfigError",
        'secret "tokens" not found',
    ),
    "forbidden": (
        apps.app("forbidden", podTemplate={"spec": {"hostNetwork": True}}),
        "Scheduled",
        "PodsRefused",
        'violates PodSecurity "restricted:latest"',
    ),
    "machine": (
        apps.app("machine", numGPUs=1, worldSize=None, machineType="B4000"),
        "Scheduled",
        "NoMatchingMachineType",
        "spec.machineType B4000",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_has_a_reason_and_a_cure(kube: Kube, name: str) -> None:
    manifest, type, reason, words = TROUBLES[name]
    app = App(kube, manifest)
    live = app.shows(type, "False", reason)
    assert words in condition(live, type)["message"]
    summary = condition(live, "Ready")
    assert (summary["status"], summary["reason"]) == ("False", reason)
    assert words in summary["message"]
    if name == "setup":
        failure = last_failure(app, rank=1)["status"]["lastFailure"]
        assert "RuntimeError: the weights are not there" in failure["message"]
    if name == "memory":
        failure = last_failure(app, reason="OOMKilled")["status"]["lastFailure"]
        assert "killed by SIGKILL" in failure["message"]
        assert failure["signal"] == "SIGKILL"
        assert "rank" in failure


def test_a_pod_that_its_node_refuses(kube: Kube) -> None:
    """Past the scheduler, so that the kubelet is the one who counts; it goes on by itself when there is room."""
    node = kube.list("node", f"{NODE_LABEL}=true")[0]["metadata"]["name"]
    asks = {"requests": {"cpu": "1000", "memory": "128Mi"}}
    app = App(kube, apps.app("refused", resources=asks, podTemplate={"spec": {"nodeName": node}}))
    live = app.shows("RanksReady", "False", "RefusedByNode")
    assert "OutOfcpu" in condition(live, "RanksReady")["message"]
    assert condition(live, "Ready")["reason"] == "RefusedByNode"
    app.change(resources={"requests": {"cpu": "20m", "memory": "128Mi"}})
    assert "Serving" in {group["state"] for group in app.ready()["status"]["groups"]}


def test_a_pod_goes_on_when_what_it_mounts_is_there(kube: Kube) -> None:
    volumes = [{"name": "keys", "secret": {"secretName": "late"}}]
    worker = {"name": "worker", "volumeMounts": [{"name": "keys", "mountPath": "/keys"}]}
    app = App(kube, apps.app("waits", podTemplate={"spec": {"volumes": volumes, "containers": [worker]}}))
    assert 'secret "late" not found' in app.says("RanksReady", "False", "MountFailed")
    uid = app.pod()["metadata"]["uid"]
    kube("create", "secret", "generic", "late", "--from-literal=a=b")
    app.ready(limit=300)  # the kubelet tries again after at most two minutes
    assert app.pod()["metadata"]["uid"] == uid
