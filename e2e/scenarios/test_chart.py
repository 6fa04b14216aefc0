"""The chart on a real cluster: its own test, upgrades with a live app, and what stays when it is uninstalled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from e2e.cluster.current import CurrentCluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.provider import Cluster
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import Kube, Object
from e2e.harness.operator import CHART, DEPLOYMENT, RELEASE, Operator

TEST = f"{RELEASE}-test"
DEFINITIONS = ("distributedapps.drumline.dev", "machinetypes.drumline.dev")


@pytest.fixture
def values(operator: Operator) -> Iterator[dict[str, Any]]:
    """What the release was installed with; afterwards it is again."""
    found: dict[str, Any] = json.loads(operator.helm("get", "values", RELEASE, "--output=json"))
    yield found
    upgrade(operator, found)


def upgrade(operator: Operator, values: dict[str, Any], *options: str) -> None:
    """Install the chart, or bring the release up to date, and wait for it."""
    chosen = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    operator.helm("upgrade", "--install", RELEASE, str(CHART), "--wait", "--timeout=300s", *chosen, *options)
    operator.settled()


def uids(kube: Kube, kind: str) -> dict[str, str]:
    return {each["metadata"]["name"]: each["metadata"]["uid"] for each in kube.list(kind)}


def lives(pod: Object) -> tuple[str, int, str]:
    """What changes when a pod, or the container in it, is another one."""
    (worker,) = pod["status"]["containerStatuses"]
    return pod["metadata"]["uid"], worker["restartCount"], worker["containerID"]


def test_it_tests_itself_and_leaves_nothing(operator: Operator) -> None:
    said = operator.helm("test", RELEASE, "--logs", "--timeout=400s")
    assert "Phase:          Succeeded" in said
    assert "Ready=True" in said
    assert "answered {'sum': 41, 'ranks': 2}" in said
    kube = operator.kube
    for kind in ("serviceaccount", "role", "rolebinding"):
        assert TEST not in uids(kube, kind)
    for kind in ("dapp", "pod", "deployment"):
        kube.until_all(kind, lambda found: TEST not in found, f"the test's {kind} is gone, too")


def test_its_test_fails_with_the_apps_own_words(operator: Operator, values: dict[str, Any]) -> None:
    upgrade(operator, values, "--set=test.image.repository=localhost/nothing", "--set=test.timeoutSeconds=40")
    with pytest.raises(ClusterError, match=TEST):
        operator.helm("test", RELEASE, "--timeout=240s")
    log = operator.kube("logs", f"pod/{TEST}")
    assert "failed: " in log
    assert "localhost/nothing" in log
    # The next test begins with removing what this one has left.
    upgrade(operator, values, "--set=test.timeoutSeconds=200")
    operator.helm("test", RELEASE, "--timeout=400s")


def test_two_operators_on_two_nodes_are_watched(operator: Operator) -> None:
    pods = operator.settled()
    assert len(pods) == 2
    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 2
    assert operator.leader() in pods
    service = f"/api/v1/namespaces/{operator.kube.namespace}/services/{DEPLOYMENT}:http/proxy"
    assert "drumline_operator_leader" in operator.kube.raw(f"{service}/metrics")
    operator.kube.until("pdb", DEPLOYMENT, lambda item: item["status"]["disruptionsAllowed"] == 1, "one may be evicted")


def test_an_upgrade_restarts_no_app(operator: Operator, values: dict[str, Any], kube: Kube, client: Client) -> None:
    app = App(kube, apps.app("lives"))
    app.ready()
    before, machines, operators = lives(app.pod()), uids(kube, "mt"), uids(operator.kube, "pod")
    deployment = kube.get("deployment", "lives")["metadata"]
    load = client.load(app.url, {})
    load.take(3)
    upgrade(operator, values, "--set=log.level=debug", "--set=podLabels.upgraded=yes")
    assert operator.leader() in set(operator.settled()) - set(operators)
    # The new operator works: it repairs what somebody breaks.
    broken = kube.get("service", "lives")["metadata"]["uid"]
    kube("delete", "service/lives", "--wait=false")
    kube.until("service", "lives", lambda item: item["metadata"]["uid"] != broken, "it is made again")
    app.ready()
    load.take(3)
    load.stop()
    assert lives(app.pod()) == before
    after = kube.get("deployment", "lives")["metadata"]
    assert (after["uid"], after["generation"]) == (deployment["uid"], deployment["generation"])
    # They came as a hook with the first install; since an upgrade they are ordinary objects, and still the same.
    assert uids(kube, "mt") == machines
    manifest = list(yaml.safe_load_all(operator.helm("get", "manifest", RELEASE)))
    assert {each["metadata"]["name"] for each in manifest if each and each["kind"] == "MachineType"} <= set(machines)
    assert any(each and each["kind"] == "MachineType" for each in manifest)


def test_values_of_machine_types_reach_the_cluster(operator: Operator, values: dict[str, Any], kube: Kube) -> None:
    machine = {"nodeSelector": {"kubernetes.io/os": "linux"}, "aliases": ["Any"]}
    upgrade(operator, {**values, "machineTypes": {"anything": machine}})
    found = kube.until("mt", "anything", lambda item: item.get("status", {}).get("nodes", 0) >= 2, "it has nodes")
    assert found["status"]["allocatableGPUs"] >= 2
    upgrade(operator, values)
    # Apps may name it, so it stays until somebody removes it.
    assert "anything" in uids(kube, "mt")
    kube("delete", "machinetype/anything")


def test_apps_stay_when_it_is_uninstalled(
    operator: Operator, values: dict[str, Any], kube: Kube, client: Client
) -> None:
    app = App(kube, apps.app("stays"))
    app.ready()
    before, machines, definitions = lives(app.pod()), uids(kube, "mt"), uids(kube, "crd")
    operator.helm("uninstall", RELEASE, "--wait", "--timeout=180s")
    operator.gone()
    assert client.call(app.url, {}).status == 200
    assert set(DEFINITIONS) <= set(uids(kube, "crd"))
    assert (uids(kube, "mt"), uids(kube, "crd")) == (machines, definitions)
    upgrade(operator, values)
    app.change(rollout={"progressDeadlineSeconds": 700})  # somebody reads it: status follows the new generation
    app.ready()
    assert lives(app.pod()) == before
    assert uids(kube, "mt") == machines
    assert client.call(app.url, {}).status == 200


def test_all_goes_when_nothing_is_to_be_kept(
    cluster: Cluster, operator: Operator, values: dict[str, Any], kube: Kube
) -> None:
    if isinstance(cluster, CurrentCluster):
        pytest.skip("this removes all apps of a cluster")
    app = App(kube, apps.app("goes"))
    app.ready()
    upgrade(operator, values, "--set=crds.keep=false")
    operator.helm("uninstall", RELEASE, "--wait", "--timeout=180s")
    kube.until_all("crd", lambda found: not set(DEFINITIONS) & set(found), "the definitions are gone")
    kube.until_all("pod", lambda pods: not pods, "the app's pods are gone", selector=app.labels)
    kube.until_all("service", lambda found: not found, "its Service is gone", selector=app.labels)
