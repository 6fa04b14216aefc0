"""Every value changes what is rendered, where it should, and what is rendered then is valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .conftest import NAME, NAMESPACE, Helm, Object, container, keys, one, ordinary, pod, variable
from .test_values import SCHEMA, TOOL

SHA = "sha256:" + "0" * 64

Check = Callable[[list[Object]], Any]
MONITORS = {"metrics": {"serviceMonitor": {"create": True}, "podMonitor": {"create": True}}}
POLICY: dict[str, Any] = {"networkPolicy": {"create": True}}
TOLERATION = {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute", "tolerationSeconds": 3}
MACHINE = {
    "resourceName": "amd.com/gpu",
    "gpusPerNode": 4,
    "nodeSelector": {"a": "b"},
    "tolerations": [TOLERATION],
    "runtimeClassName": "nvidia",
    "sharedMemorySizePerGPU": "2Gi",
    "env": [{"name": "A", "value": "b"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}],
    "aliases": ["Mine"],
}


def served(items: list[Object]) -> Object:
    return one(items, "DistributedApp")


def monitor(kind: str, key: str, name: str) -> Check:
    return lambda items: one(items, kind)["spec"][key][0][name]


def with_monitor(kind: str, **values: Any) -> dict[str, Any]:
    return {"metrics": {kind: {"create": True, **values}}}


def some(kind: str, name: str) -> Check:
    return lambda items: (kind, name) in keys(items)


def absent(kind: str, name: str) -> Check:
    return lambda items: (kind, name) not in keys(items)


def image(items: list[Object]) -> Any:
    return container(items)["image"]


#: Values by the leaf of the schema that they set, and what they change: True, or what the place has then.
EFFECTS: dict[str, tuple[dict[str, Any], Check | tuple[Check, Any]]] = {
    "fullnameOverride": ({"fullnameOverride": "other"}, some("Deployment", "other-operator")),
    "replicas": ({"replicas": 3}, (lambda items: one(items, "Deployment")["spec"]["replicas"], 3)),
    "image.repository": ({"image": {"repository": "a/b"}}, (image, "a/b:0.1.0")),
    "image.tag": ({"image": {"repository": "a/b", "tag": "x"}}, (image, "a/b:x")),
    "image.digest": ({"image": {"repository": "a/b", "tag": "x", "digest": SHA}}, (image, f"a/b@{SHA}")),
    "image.pullPolicy": (
        {"image": {"pullPolicy": "Always"}},
        (lambda items: container(items)["imagePullPolicy"], "Always"),
    ),
    "imagePullSecrets": (
        {"imagePullSecrets": [{"name": "key"}]},
        (lambda items: pod(items)["spec"]["imagePullSecrets"], [{"name": "key"}]),
    ),
    "workerImage.repository": (
        {"workerImage": {"repository": "w"}},
        (lambda items: variable(items, "WORKER_IMAGE"), "w:0.1.0"),
    ),
    "workerImage.tag": (
        {"workerImage": {"repository": "w", "tag": "x"}},
        (lambda items: variable(items, "WORKER_IMAGE"), "w:x"),
    ),
    "workerImage.digest": (
        {"workerImage": {"repository": "w", "digest": SHA}},
        (lambda items: variable(items, "WORKER_IMAGE"), f"w@{SHA}"),
    ),
    "gitImage.repository": (
        {"gitImage": {"repository": "g"}},
        (lambda items: variable(items, "GIT_IMAGE"), "g:0.1.0"),
    ),
    "gitImage.tag": (
        {"gitImage": {"repository": "g", "tag": "x"}},
        (lambda items: variable(items, "GIT_IMAGE"), "g:x"),
    ),
    "gitImage.digest": (
        {"gitImage": {"repository": "g", "digest": SHA}},
        (lambda items: variable(items, "GIT_IMAGE"), f"g@{SHA}"),
    ),
    "watchNamespaces": (
        {"watchNamespaces": ["a", "b"]},
        (lambda items: variable(items, "WATCH_NAMESPACES"), "a,b"),
    ),
    "watchNodes": ({"watchNodes": False}, (lambda items: variable(items, "WATCH_NODES"), "false")),
    "clusterDomain": ({"clusterDomain": "k8s.acme"}, (lambda items: variable(items, "CLUSTER_DOMAIN"), "k8s.acme")),
    "crds.install": (
        {"crds": {"install": False}},
        absent("CustomResourceDefinition", "machinetypes.drumline.dev"),
    ),
    "crds.keep": (
        {"crds": {"keep": False}},
        lambda items: not any("helm.sh/resource-policy" in each["metadata"].get("annotations", {}) for each in items),
    ),
    "machineTypes": (
        {"machineTypes": {"mine": MACHINE}},
        (lambda items: one(items, "MachineType", "mine")["spec"], MACHINE),
    ),
    "log.level": ({"log": {"level": "debug"}}, (lambda items: variable(items, "LOG_LEVEL"), "debug")),
    "log.format": ({"log": {"format": "text"}}, (lambda items: variable(items, "LOG_FORMAT"), "text")),
    "serviceAccount.create": (
        {"serviceAccount": {"create": False, "name": "mine"}},
        lambda items: absent("ServiceAccount", "mine")(items) and absent("ServiceAccount", NAME)(items),
    ),
    "serviceAccount.name": (
        {"serviceAccount": {"name": "mine"}},
        lambda items: (
            pod(items)["spec"]["serviceAccountName"] == "mine"
            and some("ServiceAccount", "mine")(items)
            and {
                subject["name"]
                for each in ordinary(items)
                if each["kind"] in {"RoleBinding", "ClusterRoleBinding"}
                for subject in each["subjects"]
            }
            == {"mine"}
        ),
    ),
    "serviceAccount.annotations": (
        {"serviceAccount": {"annotations": {"a": "b"}}},
        (lambda items: one(items, "ServiceAccount", NAME)["metadata"]["annotations"], {"a": "b"}),
    ),
    "rbac.create": ({"rbac": {"create": False}}, absent("ClusterRole", NAME)),
    "rbac.userRoles": ({"rbac": {"userRoles": False}}, absent("ClusterRole", "drumline-viewer")),
    "rbac.aggregate": (
        {"rbac": {"aggregate": False}},
        lambda items: "aggregate" not in str(one(items, "ClusterRole", "drumline-viewer")["metadata"]["labels"]),
    ),
    "metrics.service.create": ({"metrics": {"service": {"create": False}}}, absent("Service", NAME)),
    "metrics.service.port": (
        {"metrics": {"service": {"port": 9}}},
        (lambda items: one(items, "Service")["spec"]["ports"][0]["port"], 9),
    ),
    "metrics.service.annotations": (
        {"metrics": {"service": {"annotations": {"a": "b"}}}},
        (lambda items: one(items, "Service")["metadata"]["annotations"], {"a": "b"}),
    ),
    "metrics.serviceMonitor.create": (MONITORS, some("ServiceMonitor", NAME)),
    "metrics.serviceMonitor.interval": (
        with_monitor("serviceMonitor", interval="7s"),
        (monitor("ServiceMonitor", "endpoints", "interval"), "7s"),
    ),
    "metrics.serviceMonitor.scrapeTimeout": (
        with_monitor("serviceMonitor", scrapeTimeout="7s"),
        (monitor("ServiceMonitor", "endpoints", "scrapeTimeout"), "7s"),
    ),
    "metrics.serviceMonitor.labels": (
        with_monitor("serviceMonitor", labels={"release": "x"}),
        (lambda items: one(items, "ServiceMonitor")["metadata"]["labels"]["release"], "x"),
    ),
    "metrics.podMonitor.create": (MONITORS, some("PodMonitor", "drumline-apps")),
    "metrics.podMonitor.interval": (
        with_monitor("podMonitor", interval="7s"),
        (monitor("PodMonitor", "podMetricsEndpoints", "interval"), "7s"),
    ),
    "metrics.podMonitor.scrapeTimeout": (
        with_monitor("podMonitor", scrapeTimeout="7s"),
        (monitor("PodMonitor", "podMetricsEndpoints", "scrapeTimeout"), "7s"),
    ),
    "metrics.podMonitor.labels": (
        with_monitor("podMonitor", labels={"release": "x"}),
        (lambda items: one(items, "PodMonitor")["metadata"]["labels"]["release"], "x"),
    ),
    "podDisruptionBudget.create": ({"podDisruptionBudget": {"create": False}}, absent("PodDisruptionBudget", NAME)),
    "networkPolicy.create": (POLICY, some("NetworkPolicy", NAME)),
    "networkPolicy.apiServerPorts": (
        {"networkPolicy": {"create": True, "apiServerPorts": [16443]}},
        lambda items: (
            {"port": 16443, "protocol": "TCP"}
            in [port for rule in one(items, "NetworkPolicy")["spec"]["egress"] for port in rule.get("ports", ())]
        ),
    ),
    "networkPolicy.metricsFrom": (
        {"networkPolicy": {"create": True, "metricsFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        (
            lambda items: one(items, "NetworkPolicy")["spec"]["ingress"][0]["from"],
            [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        ),
    ),
    "resources.requests": (
        {"resources": {"requests": {"cpu": 1}}},
        (lambda items: container(items)["resources"]["requests"]["cpu"], 1),
    ),
    "resources.limits": (
        {"resources": {"limits": {"memory": "1Gi"}}},
        (lambda items: container(items)["resources"]["limits"]["memory"], "1Gi"),
    ),
    "podAnnotations": (
        {"podAnnotations": {"a": "b"}},
        (lambda items: pod(items)["metadata"]["annotations"], {"a": "b"}),
    ),
    "podLabels": ({"podLabels": {"a": "b"}}, (lambda items: pod(items)["metadata"]["labels"]["a"], "b")),
    "priorityClassName": (
        {"priorityClassName": "high"},
        (lambda items: pod(items)["spec"]["priorityClassName"], "high"),
    ),
    "nodeSelector": (
        {"nodeSelector": {"a": "b"}},
        (lambda items: pod(items)["spec"]["nodeSelector"], {"kubernetes.io/os": "linux", "a": "b"}),
    ),
    "tolerations": (
        {"tolerations": [TOLERATION]},
        (lambda items: pod(items)["spec"]["tolerations"], [TOLERATION]),
    ),
    "affinity": (
        {"affinity": {"podAntiAffinity": {}}},
        (lambda items: pod(items)["spec"]["affinity"], {"podAntiAffinity": {}}),
    ),
    "topologySpreadConstraints": (
        {"topologySpreadConstraints": [{"topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]},
        (
            lambda items: [
                (each["topologyKey"], each["maxSkew"], each["whenUnsatisfiable"])
                for each in pod(items)["spec"]["topologySpreadConstraints"]
            ],
            [("rack", 1, "DoNotSchedule")],
        ),
    ),
    "extraEnv": (
        {"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]},
        lambda items: {"name": "HTTPS_PROXY", "value": "http://proxy"} in container(items)["env"],
    ),
    "test.image.repository": (
        {"test": {"image": {"repository": "t"}}},
        (lambda items: served(items)["spec"]["image"], "t:0.1.0"),
    ),
    "test.image.tag": (
        {"test": {"image": {"repository": "t", "tag": "x"}}},
        (lambda items: served(items)["spec"]["image"], "t:x"),
    ),
    "test.image.digest": (
        {"test": {"image": {"repository": "t", "digest": SHA}}},
        (lambda items: served(items)["spec"]["image"], f"t@{SHA}"),
    ),
    "test.timeoutSeconds": (
        {"test": {"timeoutSeconds": 77}},
        (lambda items: served(items)["spec"]["serving"]["startupTimeoutSeconds"], 77),
    ),
}


def leaves(values: Any, place: str = "") -> Iterator[str]:
    """The values at which a table of defaults ends, without what they are made of."""
    whole = {"machineTypes", "resources.requests", "resources.limits", "nodeSelector"}
    if isinstance(values, dict) and values and place not in whole:
        for key, value in values.items():
            yield from leaves(value, f"{place}.{key}" if place else key)
    else:
        yield place


def holds(check: Check | tuple[Check, Any], items: list[Object]) -> bool:
    place, wanted = check if isinstance(check, tuple) else (check, True)
    try:
        return bool(place(items) == wanted)
    except (KeyError, AssertionError):  # the object, or its field, is not there
        return False


def test_every_value_is_in_the_table() -> None:
    assert set(EFFECTS) == set(leaves(TOOL["defaults"](SCHEMA)))


@pytest.mark.parametrize("value", EFFECTS)
def test_every_value_has_an_effect(
    helm: Helm, conform: Callable[[list[Object]], None], defaults: list[Object], value: str
) -> None:
    values, check = EFFECTS[value]
    assert not holds(check, defaults)
    changed = helm.render(values)
    assert holds(check, changed)
    conform(changed)


def test_a_machine_type_can_be_left_out(helm: Helm) -> None:
    names = [name for kind, name in keys(helm.render({"machineTypes": {"h100": None}})) if kind == "MachineType"]
    assert "a100" in names
    assert "h100" not in names


def test_namespaces_limit_what_the_operator_may_do(helm: Helm) -> None:
    items = helm.render({"watchNamespaces": ["a", "b"]})
    bound = {
        (each["kind"], each["metadata"].get("namespace"), each["roleRef"]["kind"], each["roleRef"]["name"])
        for each in ordinary(items)
        if each["kind"] in {"RoleBinding", "ClusterRoleBinding"}
    }
    assert bound == {
        ("RoleBinding", "a", "ClusterRole", NAME),
        ("RoleBinding", "b", "ClusterRole", NAME),
        ("RoleBinding", NAMESPACE, "Role", NAME),
        ("ClusterRoleBinding", None, "ClusterRole", f"{NAME}-machines"),
    }
