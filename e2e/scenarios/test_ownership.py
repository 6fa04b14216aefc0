"""Who owns what: children that somebody changes, apps that go while nobody looks, and who may do what."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from e2e.cluster.errors import ClusterError
from e2e.cluster.waiting import wait_for
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import LIMIT, Kube
from e2e.harness.operator import Operator

CHILDREN = ("deployment", "service", "pdb")


def test_a_child_that_somebody_changes_is_repaired(kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("drifts"))
    app.ready()
    image = app.pod()["spec"]["containers"][0]["image"]
    kube("scale", "deployment/drifts", "--replicas=0")
    kube.until("deployment", "drifts", lambda item: item["spec"]["replicas"] == 1, "the operator's word counts")
    kube("set", "image", "deployment/drifts", "worker=localhost/else:1")
    kube.until(
        "deployment",
        "drifts",
        lambda item: item["spec"]["template"]["spec"]["containers"][0]["image"] == image,
        "the image is back",
    )
    kube.patch("service", "drifts", {"spec": {"selector": {"drumline.dev/app": "else"}}})
    kube.until(
        "service",
        "drifts",
        lambda item: item["spec"]["selector"]["drumline.dev/app"] == "drifts",
        "it leads to its pods",
    )
    # Apply alone would put the wanted port beside this one, and both have the same name.
    kube(
        "patch", "service", "drifts", "--type=json", '--patch=[{"op":"replace","path":"/spec/ports/0/port","value":9}]'
    )
    kube.until(
        "service",
        "drifts",
        lambda item: [port["port"] for port in item["spec"]["ports"]] == [8080],
        "its port is back",
    )
    for kind in ("service", "pdb"):
        uid = kube.get(kind, "drifts")["metadata"]["uid"]
        kube("delete", kind, "drifts")
        kube.until(kind, "drifts", lambda item, uid=uid: item["metadata"]["uid"] != uid, "it is made again")
    app.ready()
    app.reported("Deployment: spec.replicas: 0 -> 1", "'localhost/else:1' -> ")
    assert client.call(app.url, {}).status == 200

    uid = kube.get("deployment", "drifts")["metadata"]["uid"]
    kube("delete", "deployment", "drifts", "--wait=false")
    kube.until("deployment", "drifts", lambda item: item["metadata"]["uid"] != uid, "the Deployment is made again")
    app.ready()
    assert client.call(app.url, {}).status == 200


@pytest.fixture
def stopped(operator: Operator) -> Iterator[Operator]:
    """The operator, which runs again after the test."""
    yield operator
    operator.start()


def test_a_deployment_of_another_selector_is_made_anew_without_a_break(
    kube: Kube, client: Client, stopped: Operator
) -> None:
    """A backup, say, put it back with one label more. Its pods serve until a rollout has replaced them."""
    app = App(kube, apps.app("again"))
    app.ready()
    load = client.load(app.url, {}, callers=1)
    load.take(3)
    stopped.stop()
    theirs = kube.get("deployment", "again")
    kube("delete", "deployment", "again", "--cascade=orphan")
    for key in ("uid", "resourceVersion", "generation", "managedFields", "creationTimestamp"):
        theirs["metadata"].pop(key, None)
    theirs["metadata"]["annotations"].pop("deployment.kubernetes.io/revision", None)
    theirs.pop("status", None)
    for labels in (theirs["spec"]["selector"]["matchLabels"], theirs["spec"]["template"]["metadata"]["labels"]):
        labels["more"] = "x"
    kube("create", "--filename=-", input=json.dumps(theirs))
    uid = kube.get("deployment", "again")["metadata"]["uid"]
    stopped.start()
    live = kube.until("deployment", "again", lambda item: item["metadata"]["uid"] != uid, "it is made anew")
    assert "more" not in live["spec"]["selector"]["matchLabels"]
    kube.until_all(
        "pod",
        lambda pods: ["more" in each["metadata"]["labels"] for each in pods.values()] == [False],
        "one pod of ours is left",
        selector=app.labels,
    )
    app.ready()
    load.catch_up()
    load.take(3)
    load.stop()
    assert load.bad == []
    app.reported("Warning MadeAnew: Deployment")


def test_without_an_operator_apps_can_be_deleted(kube: Kube, stopped: Operator) -> None:
    app = App(kube, apps.app("leaves"))
    app.ready()
    pod = app.pod()["metadata"]["name"]
    stopped.stop()
    kube("delete", "dapp", "leaves", "--timeout=120s")
    for name in (*(f"{kind}/leaves" for kind in CHILDREN), f"pod/{pod}"):
        kube("wait", "--for=delete", name, "--timeout=180s")
    # What comes meanwhile is found when the operator is back.
    late = App(kube, apps.app("arrives"))
    stopped.start()
    late.ready()


def allowed(kube: Kube, *question: str) -> bool:
    """What `kubectl auth can-i` says; for "no" it fails."""
    try:
        return kube(*question).strip() == "yes"
    except ClusterError:
        return False


def test_what_viewers_and_editors_may_do(kube: Kube, operator: Operator) -> None:
    """Through the roles that Kubernetes itself has: `view` and `edit` include ours."""
    for role in ("view", "edit"):
        kube("create", "serviceaccount", role)
        kube("create", "rolebinding", role, f"--clusterrole={role}", f"--serviceaccount={kube.namespace}:{role}")
    viewer = f"--as=system:serviceaccount:{kube.namespace}:view"
    editor = f"--as=system:serviceaccount:{kube.namespace}:edit"
    App(kube, apps.app("watched", suspend=True)).says("Ready", "False", "Suspended")

    # The API server follows bindings, and `view` and `edit` follow our roles, with a delay of which nobody is told.
    for person, verb in ((viewer, "get"), (editor, "patch")):
        asked = ("auth", "can-i", verb, "distributedapps.drumline.dev", person)
        wait_for(" ".join(asked), lambda asked=asked: allowed(kube, *asked), limit=LIMIT)  # type: ignore[misc]
    assert "watched" in kube("get", "dapp", viewer)
    for arguments in (("delete", "dapp/watched"), ("scale", "dapp/watched", "--replicas=2")):
        with pytest.raises(ClusterError, match=r'cannot .* resource "distributedapps'):
            kube(*arguments, viewer)

    kube("scale", "dapp/watched", "--replicas=2", editor)
    kube("patch", "dapp/watched", "--type=merge", '--patch={"spec":{"suspend":true}}', editor)
    with pytest.raises(ClusterError, match="distributedapps/status"):
        kube("patch", "dapp/watched", "--subresource=status", "--type=merge", '--patch={"status":{}}', editor)
    with pytest.raises(ClusterError, match="machinetypes"):
        kube(
            "create",
            "--filename=-",
            editor,
            input='{"apiVersion":"drumline.dev/v1alpha1","kind":"MachineType","metadata":{"name":"mine"},"spec":{}}',
        )
    kube("delete", "dapp/watched", editor)


def test_what_belongs_to_somebody_else_is_left_alone(kube: Kube, operator: Operator) -> None:
    """A Service of somebody else that has the app's name is neither changed nor removed."""
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken"}, "spec": {"ports": [{"port": 80}]}}
    kube.apply(service)
    uid = kube.get("service", "taken")["metadata"]["uid"]
    app = App(kube, apps.app("taken"))
    assert "Service taken exists already" in app.says("Ready", "False", "NameTaken")
    kube("delete", "dapp", "taken")
    live = kube.get("service", "taken")
    assert (live["metadata"]["uid"], live["spec"]["ports"][0]["port"]) == (uid, 80)
