"""What is rendered: the defaults, what each value changes, and rules that hold for everything."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from e2e.cluster.__main__ import conform as conformity
from e2e.cluster.store import Store

from drumline.api.v1alpha1 import GROUP, DistributedApp, MachineType
from drumline_operator.crd import custom_resource_definitions
from drumline_operator.manifests import labels
from drumline_operator.settings import OperatorSettings

from .conftest import (
    CHART,
    KNOWN,
    NAME,
    NAMESPACE,
    RELEASE,
    ROOT,
    Helm,
    Object,
    container,
    keys,
    one,
    ordinary,
    pod,
    pod_specs,
    program,
    variable,
)
from .test_values import SCHEMA, TOOL

PROBED = ("startupProbe", "livenessProbe", "readinessProbe")


# -- the defaults


def test_what_is_installed(defaults: list[Object]) -> None:
    machines = TOOL["defaults"](SCHEMA)["machineTypes"]
    assert keys(ordinary(defaults)) == sorted(
        [
            ("ClusterRole", "drumline-admin"),
            ("ClusterRole", "drumline-editor"),
            ("ClusterRole", "drumline-viewer"),
            ("ClusterRole", NAME),
            ("ClusterRole", f"{NAME}-machines"),
            ("ClusterRoleBinding", NAME),
            ("ClusterRoleBinding", f"{NAME}-machines"),
            ("CustomResourceDefinition", "distributedapps.drumline.dev"),
            ("CustomResourceDefinition", "machinetypes.drumline.dev"),
            ("Deployment", NAME),
            *(("MachineType", name) for name in machines),
            ("PodDisruptionBudget", NAME),
            ("Role", NAME),
            ("RoleBinding", NAME),
            ("Service", NAME),
            ("ServiceAccount", NAME),
        ]
    )


def test_all_manifests_are_valid(helm: Helm, conform: Callable[[list[Object]], None]) -> None:
    for known in (True, False):
        conform(helm.render(known=known))


def test_two_replicas_that_keep_apart(defaults: list[Object]) -> None:
    deployment = one(defaults, "Deployment")
    assert deployment["spec"]["replicas"] == 2
    selector = deployment["spec"]["selector"]["matchLabels"]
    apart = pod(defaults)["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    terms = [each["podAffinityTerm"] for each in apart]
    assert [each["topologyKey"] for each in terms] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert all(each["labelSelector"]["matchLabels"] == selector for each in terms)
    assert "topologySpreadConstraints" not in pod(defaults)["spec"], "nodes without a zone would count for none of them"
    budget = one(defaults, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, selector)
    assert one(defaults, "Service")["spec"]["selector"] == selector
    assert selector.items() <= pod(defaults)["metadata"]["labels"].items()


def test_the_policies_of_apps_know_the_operator(defaults: list[Object]) -> None:
    """An app with `networkPolicy: DenyAllIngress` lets in pods of this name from the operator's namespace."""
    assert pod(defaults)["metadata"]["labels"]["app.kubernetes.io/name"] == labels.OPERATOR
    assert variable(defaults, "NAMESPACE") == {"fieldRef": {"fieldPath": "metadata.namespace"}}


def test_probes_ask_the_process(defaults: list[Object]) -> None:
    worker = container(defaults)
    (port,) = worker["ports"]
    paths = {name: worker[name]["httpGet"]["path"] for name in PROBED}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert {worker[name]["httpGet"]["port"] for name in PROBED} == {port["name"]}
    assert one(defaults, "Service")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_definitions_are_those_of_the_models(defaults: list[Object]) -> None:
    for text in custom_resource_definitions().values():
        wanted = yaml.safe_load(text)
        found = one(defaults, "CustomResourceDefinition", wanted["metadata"]["name"])
        assert found["spec"] == wanted["spec"]
        assert found["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_machine_types_come_after_their_definition(helm: Helm, defaults: list[Object]) -> None:
    """On a first install as a hook, which the next upgrade takes over: by these annotations, and by this label."""
    first, later = helm.render(known=False), defaults
    assert keys(first) == keys(later)
    owned = {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
    for items, hook in ((first, "post-install,post-upgrade"), (later, None)):
        for item in (each for each in items if each["kind"] == "MachineType"):
            MachineType.model_validate(item)
            annotations = item["metadata"]["annotations"]
            assert annotations.get("helm.sh/hook") == hook
            assert owned.items() <= annotations.items()
            assert annotations["helm.sh/resource-policy"] == "keep"
            assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    assert KNOWN.startswith(GROUP)


def test_aliases_name_one_machine(defaults: list[Object]) -> None:
    machines = [each for each in defaults if each["kind"] == "MachineType"]
    names = [
        *(each["metadata"]["name"] for each in machines),
        *(a for each in machines for a in each["spec"]["aliases"]),
    ]
    assert len(names) == len(set(names))
    assert {"GPU-H100", "GPU-A100", "GPU-L40S"} <= set(names)
    products = [each["spec"]["nodeSelector"]["nvidia.com/gpu.product"] for each in machines]
    assert len(products) == len(set(products))


def test_notes_name_the_next_three_commands(helm: Helm) -> None:
    notes = helm.notes()
    commands = [line.strip() for line in notes.splitlines() if line.startswith("   ") and line[3] in "hk"]
    assert [line.split()[:2] for line in commands] == [
        ["helm", "test"],
        ["kubectl", "get"],
        ["kubectl", "apply"],
    ]
    example = next(part for part in notes.split("app.yaml:\n") if "apiVersion" in part)
    document = yaml.safe_load(example.partition("Documentation:")[0])
    DistributedApp.model_validate(document)
    assert "deletes all DistributedApps" in helm.notes({"crds": {"keep": False}})
    assert "deletes all DistributedApps" not in notes
    assert "need an image of their own" in helm.notes({"workerImage": {"repository": ""}})


# -- rules for everything


def test_pods_are_of_the_restricted_profile(defaults: list[Object]) -> None:
    """And more: a user of their own, and nothing that can be written but /tmp. The API server's check: test_access.py."""
    found = list(pod_specs(defaults))
    assert len(found) == 2
    for spec in found:
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in each["resources"]["limits"]


def test_no_rule_allows_everything(helm: Helm) -> None:
    for values in ({}, {"watchNamespaces": ["a"]}, {"rbac": {"aggregate": False}}):
        roles = [each for each in helm.render(values) if each["kind"] in {"Role", "ClusterRole"}]
        assert len(roles) == 7
        for each in roles:
            for rule in each["rules"]:
                assert "*" not in json.dumps(rule)
                assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
                assert "secrets" not in rule["resources"]


def test_everything_is_labelled(defaults: list[Object]) -> None:
    wanted = {"part-of", "managed-by", "version", "instance"}
    for each in defaults:
        found = each["metadata"]["labels"]
        assert {f"app.kubernetes.io/{name}" for name in wanted} <= found.keys(), each["kind"]
        assert found["helm.sh/chart"] == "drumline-0.1.0"


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("drumline", "drumline"),
        ("my-drumline", "my-drumline"),
        ("prod", "prod-drumline"),
        ("7", "drumline-7-drumline"),
        ("a" * 53, "a" * 40),
        ("v1.2", "v1-2-drumline"),
    ],
)
def test_names(helm: Helm, conform: Callable[[list[Object]], None], release: str, name: str) -> None:
    items = helm.render(release=release)
    conform(items)
    assert one(items, "Deployment")["metadata"]["name"] == f"{name}-operator"
    # A wrong name of an app would be found only by `helm test`.
    DistributedApp.model_validate(one(items, "DistributedApp"))


def test_what_the_test_app_asks_for_is_there(defaults: list[Object]) -> None:
    app = DistributedApp.model_validate(one(defaults, "DistributedApp"))
    source = one(defaults, "ConfigMap")
    assert app.spec.source is not None
    assert app.spec.source.config_map is not None
    assert app.spec.source.config_map.name == source["metadata"]["name"]
    module, _, name = app.spec.worker_class.partition(":")
    assert f"class {name}(" in source["data"][f"{module}.py"]
    for file in ("app.py", "call.py"):
        assert source["data"][file].strip() == (CHART / "files" / file).read_text().strip()


# -- what Artifact Hub and Helm read


def test_versions_are_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == version == OperatorSettings().version


def test_artifact_hub_is_told_what_there_is(defaults: list[Object]) -> None:
    notes = {
        key.removeprefix("artifacthub.io/"): yaml.safe_load(text)
        for key, text in yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"].items()
    }
    assert {each["name"]: each["image"] for each in notes["images"]} == {
        "operator": container(defaults)["image"],
        "worker": variable(defaults, "WORKER_IMAGE"),
    }
    definitions = [each for each in defaults if each["kind"] == "CustomResourceDefinition"]
    assert {(each["kind"], each["version"], each["name"]) for each in notes["crds"]} == {
        (each["spec"]["names"]["kind"], each["spec"]["versions"][0]["name"], each["metadata"]["name"])
        for each in definitions
    }
    models = {"DistributedApp": DistributedApp, "MachineType": MachineType}
    assert [each["kind"] for each in notes["crdsExamples"]] == list(models)
    for example in notes["crdsExamples"]:
        models[example["kind"]].model_validate(example)


# -- the programs that others use


def test_helm_has_nothing_to_say(helm: Helm) -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in helm.run("lint", "--strict", str(CHART))


def test_kubeconform_takes_it(helm: Helm, tmp_path: Path) -> None:
    """With the schemas that `make scenarios` and others use, by the program itself."""
    manifests = tmp_path / "release.yaml"
    manifests.write_text(yaml.safe_dump_all(helm.render()))
    program("kubeconform")
    assert conformity(Store(), [manifests], sorted((ROOT / "crds").glob("*.yaml"))) == 0
    manifests.write_text(manifests.read_text().replace("maxUnavailable", "maxUnavailabel"))
    assert conformity(Store(), [manifests], sorted((ROOT / "crds").glob("*.yaml"))) == 1
