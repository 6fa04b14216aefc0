"""The values: one schema says what there is, what holds without it, and what it means."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema_rs import Draft7Validator, meta

from drumline.api.v1alpha1 import MachineTypeSpec, yaml_name

from .conftest import CHART, ROOT, Helm, Refused

TOOL = runpy.run_path(str(ROOT / "tools" / "chart_values.py"))
SCHEMA = TOOL["load"]()


def properties(node: Any, place: str = "values") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of the schema, wherever it is."""
    if isinstance(node, dict):
        for name, child in node.get("properties", {}).items():
            yield f"{place}.{name}", child
        for key, child in node.items():
            if key not in {"default", "if", "then", "not"}:
                yield from properties(child, f"{place}.{key}")
    elif isinstance(node, list):
        for child in node:
            yield from properties(child, place)


def test_the_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert TOOL["main"](["--check"]) == 0, capsys.readouterr().err


def test_every_value_is_described() -> None:
    meta.validate(SCHEMA)
    lacking = [place for place, node in properties(SCHEMA) if not node.get("description", "").endswith((".", "`"))]
    assert not lacking


def test_objects_are_closed() -> None:
    """But for those that Kubernetes defines."""
    free = {
        place
        for place, node in properties(SCHEMA)
        if node.get("type") == "object" and "additionalProperties" not in node
    }
    of_kubernetes = {"affinity", "valueFrom", "namespaceSelector", "podSelector", "ipBlock", "global"}
    assert {place.rpartition(".")[2] for place in free} == of_kubernetes


def test_the_defaults_are_valid() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values == TOOL["defaults"](SCHEMA)
    Draft7Validator(SCHEMA).validate(values)


def test_machine_types_have_the_fields_of_the_model() -> None:
    given = set(SCHEMA["definitions"]["machineType"]["properties"])
    assert given == {yaml_name(name) for name in MachineTypeSpec.model_fields}
    for spec in yaml.safe_load((CHART / "values.yaml").read_text())["machineTypes"].values():
        MachineTypeSpec.model_validate(spec)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"replica": 2}, "additional properties 'replica' not allowed"),
    "an unknown value inside": ({"crds": {"installed": True}}, "at '/crds': additional properties 'installed'"),
    "a text for a number": ({"replicas": "2"}, "at '/replicas': got string, want integer"),
    "no replicas": ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
    "a text for a boolean": ({"rbac": {"create": "no"}}, "at '/rbac/create': got string, want boolean"),
    "a tag in a repository": ({"image": {"repository": "Ghcr.io/x"}}, "at '/image/repository'"),
    "a short digest": ({"workerImage": {"digest": "sha256:12"}}, "at '/workerImage/digest'"),
    "another policy": ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy': value must be one of"),
    "a level in capitals": ({"log": {"level": "INFO"}}, "at '/log/level': value must be one of"),
    "a name that begins with a digit": ({"fullnameOverride": "7up"}, "at '/fullnameOverride'"),
    "a name that is too long": ({"fullnameOverride": "a" * 41}, "at '/fullnameOverride'"),
    "a secret without a name": ({"imagePullSecrets": [{}]}, "at '/imagePullSecrets/0': missing property 'name'"),
    "a secret as text": ({"imagePullSecrets": ["x"]}, "at '/imagePullSecrets/0': got string, want object"),
    "a namespace twice": ({"watchNamespaces": ["a", "a"]}, "at '/watchNamespaces': items at 0 and 1 are equal"),
    "a namespace with a dot": ({"watchNamespaces": ["a.b"]}, "at '/watchNamespaces/0'"),
    "no name for a service account": ({"serviceAccount": {"create": False}}, "at '/serviceAccount/name'"),
    "a monitor of no Service": (
        {"metrics": {"service": {"create": False}, "serviceMonitor": {"create": True}}},
        "at '/metrics/service/create'",
    ),
    "an interval without a unit": (
        {"metrics": {"podMonitor": {"interval": "30"}}},
        "at '/metrics/podMonitor/interval'",
    ),
    "a port that is none": ({"metrics": {"service": {"port": 70000}}}, "at '/metrics/service/port': maximum"),
    "memory in words": ({"resources": {"limits": {"memory": "much"}}}, "at '/resources/limits/memory'"),
    "a label that is a number": ({"podLabels": {"a": 1}}, "at '/podLabels/a': got number, want string"),
    "a variable twice": ({"extraEnv": [{"name": "A", "value": "", "valueFrom": {}}]}, "at '/extraEnv/0'"),
    "a toleration with a typo": ({"tolerations": [{"kee": "x"}]}, "at '/tolerations/0': additional properties 'kee'"),
    "a place without a key": ({"topologySpreadConstraints": [{}]}, "missing property 'topologyKey'"),
    "a machine with a typo": ({"machineTypes": {"x": {"alias": []}}}, "at '/machineTypes/x': additional properties"),
    "a machine in capitals": ({"machineTypes": {"H100": {}}}, "H100"),
    "a machine with too many GPUs": ({"machineTypes": {"x": {"gpusPerNode": 65}}}, "at '/machineTypes/x/gpusPerNode'"),
    "nobody to take metrics": ({"networkPolicy": {"metricsFrom": [{}]}}, "at '/networkPolicy/metricsFrom/0'"),
    "a test without time": ({"test": {"timeoutSeconds": 1}}, "at '/test/timeoutSeconds': minimum"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(helm: Helm, name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(Refused) as refused:
        helm.render(values)
    assert message in str(refused.value)
