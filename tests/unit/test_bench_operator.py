"""The operator's bench: its apps are valid, and the plain client makes exactly what the operator makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from bench.operator import apps
from bench.operator.api import path_of
from bench.operator.measures import CHILDREN, app_ready, pod_ready
from bench.report import Row

from drumline.api.v1alpha1 import DistributedApp, MachineType

APPS = [apps.fake_app(7, "10.0.0.1"), apps.real_app("one", "probe:1")]


@pytest.mark.parametrize("app", APPS, ids=["fake", "real"])
def test_children_are_those_of_the_operator(app: dict[str, Any]) -> None:
    DistributedApp.model_validate(app, by_name=False)
    made = apps.children(app)
    assert sorted(each["kind"] for each in made) == sorted(CHILDREN)
    for each in made:
        assert "ownerReferences" not in each["metadata"]  # the garbage collector would remove them
        assert each["metadata"]["namespace"] == apps.NAMESPACE


def test_pods_of_fake_apps_land_on_fake_nodes_only() -> None:
    MachineType.model_validate(apps.machine_type(), by_name=False)
    (deployment,) = (each for each in apps.children(APPS[0]) if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    spec = apps.machine_type()["spec"]
    assert pod["nodeSelector"] == spec["nodeSelector"]
    assert pod["tolerations"] == spec["tolerations"]


def test_paths() -> None:
    assert path_of("Deployment", "a", "b") == "/apis/apps/v1/namespaces/a/deployments/b"
    assert path_of("Pod", "a") == "/api/v1/namespaces/a/pods"
    assert path_of("Namespace", "", "a") == "/api/v1/namespaces/a"
    assert path_of("MachineType") == "/apis/drumline.dev/v1alpha1/machinetypes"


def test_ready_means_ready() -> None:
    ready = {"metadata": {}, "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Serving"}]}}
    assert pod_ready(ready)
    assert app_ready(ready)
    assert not pod_ready({**ready, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
    assert not app_ready({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "ScaledToZero"}]}})
    assert not pod_ready({"metadata": {}})


def test_no_writes_is_a_goal_that_one_write_misses() -> None:
    row = Row("restart-writes", "writes", 0, "writes")
    row.add(0)
    assert row.met
    assert not Row("restart-writes", "writes", 0, "writes", values=[1]).met
