"""Changes that are meant: a new revision, a bad one, more and fewer replicas, a pause, a drained node."""

from __future__ import annotations

from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import Kube, condition

HOLD = {"hold": True}


def test_a_new_revision_fails_no_request(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("rolls", env={"WORD": "first"}, replicas=2))
    app.ready()
    load = client.load(app.url, {})
    assert {each["word"] for each in load.take(10)} == {"first"}
    app.set_env(WORD="second")
    load.until("second", "word")
    app.replaced()
    load.catch_up()
    assert {each["word"] for each in load.take(10)} == {"second"}
    load.stop()
    assert load.bad == []
    assert {each["ranks"] for each in load.good} == {2}


def test_a_stream_outlives_its_revision(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("outlives", env={"WORD": "first"}))
    app.ready()
    old = app.pod()["metadata"]["name"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    app.set_env(WORD="second")
    live = app.ready()
    assert live["status"]["currentRevision"] == live["status"]["updateRevision"]
    client.call_until(app.url, {}, "word", "second")
    stream.take(3)
    app.release(old)
    assert stream.result()["word"] == "first"


def test_a_bad_revision_leaves_the_old_one_serving(kube: Kube, client: Client) -> None:
    rollout = {"progressDeadlineSeconds": 15, "maxSurge": 1, "maxUnavailable": 0}
    app = App(kube, apps.app("bad", env={"WORD": "good"}, rollout=rollout))
    app.ready()
    good = app.pod()["metadata"]["uid"]
    load = client.load(app.url, {}, callers=1)
    load.take(3)
    app.change(workerClass="worker_code:Stepps")
    said = app.says("Ready", "False", "ClassNotFound")
    assert "has no class 'Stepps'" in said
    assert "1 of an older revision still serve" in said
    app.says("Failed", "True", "ProgressDeadlineExceeded")
    app.says("Progressing", "False", "ProgressDeadlineExceeded", "Stepps")
    assert condition(kube.get("dapp", "bad"), "Available")["status"] == "True"
    load.catch_up()
    load.take(3)
    app.change(workerClass="worker_code:Steps")
    app.replaced()
    load.catch_up()
    load.take(3)
    load.stop()
    assert load.bad == []
    assert app.pod()["metadata"]["uid"] == good, "the pod that served all the time is the one that is left"


def test_scale_up_and_down(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("scales"))
    app.ready()
    first = app.pod()["metadata"]["uid"]
    load = client.load(app.url, {})
    load.take(3)
    kube("scale", "dapp/scales", "--replicas=3")
    app.ready()
    assert first in {pod["metadata"]["uid"] for pod in app.pods()}
    names = {pod["metadata"]["name"] for pod in app.pods()}
    load.catch_up()
    seen: set[str] = set()
    while seen < names:
        seen.add(load.take(1)[0]["pod"])
    kube("scale", "dapp/scales", "--replicas=1")
    kube.until_all("pod", lambda pods: len(pods) == 1, "two pods go", selector=app.labels)
    app.ready()
    load.catch_up()
    load.take(3)
    load.stop()
    assert load.bad == []


def test_suspend_and_resume(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("pauses"))
    app.ready()
    old = app.pod()["metadata"]["name"]
    stream = client.stream(f"{app.url}/stream", HOLD)
    stream.take(3)
    app.change(suspend=True)
    app.says("Suspended", "True", "Suspended")
    kube.until("pod", old, lambda pod: "deletionTimestamp" in pod["metadata"], "the pod is stopped")
    app.release(old)
    assert stream.result()["pod"] == old
    kube("wait", "--for=delete", f"pod/{old}", "--timeout=180s")
    app.says("Ready", "False", "Suspended")
    assert kube.get("service", "pauses")
    app.change(suspend=False)
    app.ready()
    assert client.call(app.url, {}).status == 200


def test_a_node_is_drained_one_pod_at_a_time(kube: Kube, client: Client) -> None:
    elsewhere = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [client.node]}
    preferred = {"weight": 100, "preference": {"matchExpressions": [elsewhere]}}
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
    spread = {
        "maxSkew": 2,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"drumline.dev/app": "drained"}},
    }
    template = {"spec": {"affinity": affinity, "topologySpreadConstraints": [spread]}}
    app = App(kube, apps.app("drained", replicas=2, podTemplate=template))
    app.ready()
    (node,) = {pod["spec"]["nodeName"] for pod in app.pods()}
    assert node != client.node
    old = {pod["metadata"]["name"] for pod in app.pods()}
    load = client.load(app.url, {})
    load.take(3)
    drain = f"kubectl drain {node} --ignore-daemonsets --delete-emptydir-data --pod-selector={app.labels}"
    try:
        kube(*drain.split()[1:], "--timeout=300s")
        # With nodes of their own: else they might still come to the one that was drained, once it takes pods again.
        kube.until_all(
            "pod",
            lambda pods: (
                len(pods) == 2 and not old & pods.keys() and all("nodeName" in pod["spec"] for pod in pods.values())
            ),
            "both move",
            selector=app.labels,
        )
    finally:
        kube("uncordon", node)
    assert {pod["spec"]["nodeName"] for pod in app.pods()} == {client.node}
    load.catch_up()
    load.take(3)
    load.stop()
    assert load.bad == []
