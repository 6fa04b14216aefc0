"""The generated CustomResourceDefinitions: their form, and that they accept and refuse what the models do."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from drumline.api.status import APP_CONDITIONS, DistributedAppStatus, MachineTypeStatus
from drumline.api.v1alpha1 import DistributedApp, MachineType
from drumline_operator import crd
from drumline_operator.schema import structural

ROOT = Path(__file__).parents[2]
FILES = crd.custom_resource_definitions()
DEFINITIONS = {yaml.safe_load(text)["spec"]["names"]["kind"]: yaml.safe_load(text) for text in FILES.values()}
MODELS: dict[str, type[BaseModel]] = {"DistributedApp": DistributedApp, "MachineType": MachineType}
KINDS = pytest.mark.parametrize("kind", sorted(DEFINITIONS))


def schema_of(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = DEFINITIONS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def nodes(schema: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield place, schema
    for name, part in schema.get("properties", {}).items():
        yield from nodes(part, f"{place}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{place}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{place}.*")


def as_the_server_sees_it(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema with Kubernetes' words in it said in JSON schema; unknown fields are errors, as in strict kubectl."""
    result = copy.deepcopy(dict(schema))
    for place, node in nodes(result):
        assert isinstance(node, dict)
        if node.get("x-kubernetes-int-or-string"):
            node["type"] = ["integer", "string"]
        if "properties" in node and place != ".metadata":
            node["additionalProperties"] = False
    return result


def app(**spec: Any) -> dict[str, Any]:
    base = {"image": "ghcr.io/acme/sdxl:1.0", "workerClass": "app:SDXLWorker"}
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "sdxl"},
        "spec": {**base, **spec},
    }


def machine(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "MachineType",
        "metadata": {"name": "h100"},
        "spec": spec,
    }


GOOD: dict[str, dict[str, Any]] = {
    "minimal": app(),
    "gpus": app(numGPUs=8, machineType="GPU-H100", replicas=2),
    "cpu": app(numGPUs=0, worldSize=4, communication={"backend": "Gloo"}),
    "world size as GPUs": app(numGPUs=2, worldSize=2),
    "arguments": app(setupArgs={"model": {"name": "x", "n": [1, 2.5, None]}}, warmupPayload={}),
    "pull": app(imagePullPolicy="Never", imagePullSecrets=[{"name": "a"}, {"name": "b"}]),
    "config map": app(source={"configMap": {"name": "code"}}),
    "git": app(source={"git": {"url": "https://github.com/a/b", "revision": "v1", "path": "src"}}),
    "git over ssh": app(
        source={"git": {"url": "git@github.com:a/b.git", "revision": "3f2c1ab", "secretRef": {"name": "key"}}}
    ),
    "claim": app(source={"persistentVolumeClaim": {"claimName": "code", "subPath": "sdxl"}}),
    "claimed GPUs": app(gpu={"allocation": "ResourceClaim", "resourceClaimTemplateName": "four"}),
    "slices": app(gpu={"resourceName": "nvidia.com/mig-1g.10gb"}),
    "resources": app(resources={"requests": {"cpu": "500m", "memory": "64Gi"}, "limits": {"memory": 68719476736}}),
    "shared memory": app(sharedMemorySize="16Gi"),
    "shared memory in bytes": app(sharedMemorySize=17179869184),
    "environment": app(
        env=[
            {"name": "A", "value": ""},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
        envFrom=[{"configMapRef": {"name": "c"}}],
    ),
    "cache": app(modelCache={"claimName": "w", "mountPath": "/models", "compileCachePath": "/models/.inductor"}),
    "serving": app(serving={"port": 9000, "maxQueueDepth": 0, "auth": {"type": "APIKey", "secretRef": {"name": "k"}}}),
    "recreate": app(rollout={"type": "Recreate"}),
    "surge": app(rollout={"type": "RollingUpdate", "maxSurge": "25%", "maxUnavailable": 0}),
    "drain": app(rollout={"drainTimeoutSeconds": 0, "progressDeadlineSeconds": 1}),
    "failures": app(failurePolicy={"type": "RecreatePod", "maxGroupRestarts": 0, "hangTimeoutSeconds": 0}),
    "suspended": app(suspend=True, replicas=0),
    "closed": app(networkPolicy="DenyAllIngress"),
    "template": app(
        podTemplate={
            "metadata": {"labels": {"team": "a"}, "annotations": {"x/y": "z"}},
            "spec": {"priorityClassName": "high", "containers": [{"name": "worker", "stdin": True}]},
        }
    ),
    "machine": machine(),
    "whole machine": machine(
        resourceName="nvidia.com/gpu",
        gpusPerNode=8,
        nodeSelector={"node.kubernetes.io/instance-type": "p5.48xlarge"},
        tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}],
        runtimeClassName="nvidia",
        sharedMemorySizePerGPU="4Gi",
        env=[{"name": "NCCL_DEBUG", "value": "WARN"}],
        aliases=["GPU-H100", "H100-SXM"],
    ),
}
#: What the schema alone refuses: the manifest, and the place that the refusal names.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({**app(), "spec": {"image": "a"}}, "workerClass"),
    "class without module": (app(workerClass="SDXL"), "workerClass"),
    "class as a path": (app(workerClass="src/app.py:SDXL"), "workerClass"),
    "fal's spelling": (app(num_gpus=2), "num_gpus"),
    "no number": (app(numGPUs="2"), "numGPUs"),
    "half a GPU": (app(numGPUs=0.5), "numGPUs"),
    "too many GPUs": (app(numGPUs=1025), "numGPUs"),
    "negative": (app(replicas=-1), "replicas"),
    "no rank": (app(numGPUs=0, worldSize=0), "worldSize"),
    "unknown policy": (app(imagePullPolicy="Sometimes"), "imagePullPolicy"),
    "nine secrets": (app(imagePullSecrets=[{"name": str(i)} for i in range(9)]), "imagePullSecrets"),
    "secret without name": (app(imagePullSecrets=[{}]), "imagePullSecrets"),
    "git without revision": (app(source={"git": {"url": "https://x/y"}}), "revision"),
    "git option": (app(source={"git": {"url": "https://x/y", "revision": "--upload-pack=sh"}}), "revision"),
    "git from a file": (app(source={"git": {"url": "file:///etc", "revision": "a"}}), "url"),
    "image volumes": (app(source={"oci": {"reference": "x"}}), "oci"),
    "unknown backend": (app(communication={"backend": "MPI"}), "backend"),
    "quantity": (app(sharedMemorySize="8 GB"), "sharedMemorySize"),
    "negative quantity": (app(sharedMemorySize="-1Gi"), "sharedMemorySize"),
    "resource as a fraction": (app(resources={"requests": {"cpu": 0.5}}), "cpu"),
    "resource claims": (app(resources={"claims": []}), "claims"),
    "variable without name": (app(env=[{"value": "x"}]), "name"),
    "variable as a number": (app(env=[{"name": "A", "value": 1}]), "value"),
    "environment as a map": (app(env={"A": "x"}), "env"),
    "relative mount": (app(modelCache={"mountPath": "data"}), "mountPath"),
    "port": (app(serving={"port": 65536}), "port"),
    "port zero": (app(serving={"port": 0}), "port"),
    "no time": (app(serving={"requestTimeoutSeconds": 0}), "requestTimeoutSeconds"),
    "for ever": (app(serving={"startupTimeoutSeconds": 1 << 31}), "startupTimeoutSeconds"),
    "duration in words": (app(rollout={"drainTimeoutSeconds": "10m"}), "drainTimeoutSeconds"),
    "unknown authentication": (app(serving={"auth": {"type": "OAuth"}}), "type"),
    "surge over all": (app(rollout={"maxSurge": "101%"}), "maxSurge"),
    "surge in words": (app(rollout={"maxSurge": "one"}), "maxSurge"),
    "negative surge": (app(rollout={"maxSurge": -1}), "maxSurge"),
    "partition": (app(rollout={"partition": 1}), "partition"),
    "unknown failure policy": (app(failurePolicy={"type": "None"}), "type"),
    "scaling": (app(scaling={"maxReplicas": 2}), "scaling"),
    "suspend in words": (app(suspend="yes"), "suspend"),
    "unknown network policy": (app(networkPolicy="AllowAll"), "networkPolicy"),
    "template of a deployment": (app(podTemplate={"containers": []}), "containers"),
    "label as a number": (app(podTemplate={"metadata": {"labels": {"a": 1}}}), "labels"),
    "selector as a number": (machine(nodeSelector={"gpus": 8}), "nodeSelector"),
    "machine with 65 GPUs": (machine(gpusPerNode=65), "gpusPerNode"),
    "empty alias": (machine(aliases=[""]), "aliases"),
}
#: One manifest per CEL rule, by its message's first words: the models refuse what the rule refuses.
CROSS_FIELD: dict[str, tuple[dict[str, Any], str]] = {
    "metadata.name must be at most": ({**app(), "metadata": {"name": "a" * 49}}, "metadata"),
    "metadata.name must begin": ({**app(), "metadata": {"name": "0a"}}, "metadata"),
    "spec.worldSize is for CPU apps": (app(numGPUs=2, worldSize=3), "worldSize"),
    "spec.communication.backend NCCL": (app(numGPUs=0, communication={"backend": "NCCL"}), "backend"),
    "spec.gpu.allocation ResourceClaim needs": (
        app(numGPUs=0, gpu={"allocation": "ResourceClaim", "resourceClaimTemplateName": "x"}),
        "gpu.allocation",
    ),
    "spec.resources: GPUs": (app(resources={"limits": {"nvidia.com/gpu": 1}}), "numGPUs"),
    "spec.source: set exactly one": (
        app(source={"configMap": {"name": "a"}, "persistentVolumeClaim": {"claimName": "b"}}),
        "source",
    ),
    "spec.gpu.resourceClaimTemplateName": (app(gpu={"allocation": "ResourceClaim"}), "resourceClaimTemplateName"),
    "env: set value or valueFrom": (app(env=[{"name": "A", "value": "x", "valueFrom": {}}]), "valueFrom"),
    "spec.serving.auth.secretRef": (app(serving={"auth": {"type": "APIKey"}}), "secretRef"),
    "spec.rollout.maxSurge and maxUnavailable do not": (app(rollout={"type": "Recreate", "maxSurge": 1}), "maxSurge"),
    "spec.rollout.maxSurge and maxUnavailable cannot": (
        app(rollout={"maxSurge": 0, "maxUnavailable": "0%"}),
        "maxUnavailable",
    ),
}


def cel_messages(kind: str) -> set[str]:
    return {rule["message"] for _, node in nodes(schema_of(kind)) for rule in node.get("x-kubernetes-validations", ())}


@KINDS
def test_schemas_are_structural(kind: str) -> None:
    text = str(schema_of(kind))
    assert "$ref" not in text
    assert "anyOf" not in text
    for place, node in nodes(schema_of(kind)):
        assert ("type" in node) != bool(node.get("x-kubernetes-int-or-string")), place
        assert not ({"properties", "additionalProperties"} <= set(node)), place
        assert node.get("additionalProperties") is not False, place
        if node.get("type") == "object" and place not in {".metadata"}:
            closed = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(node)
            assert len(closed) == 1, place
        if node.get("type") == "array":
            assert node["items"], place
        assert set(node.get("required", ())) <= set(node.get("properties", {})), place


@KINDS
def test_every_field_is_explained(kind: str) -> None:
    inner = {place for place, node in nodes(schema_of(kind)) if not node.get("description")}
    assert {place for place in inner if not place.endswith(("[]", ".*"))} == {".metadata"}


@KINDS
def test_lists_are_bounded(kind: str) -> None:
    unbounded = [
        place for place, node in nodes(schema_of(kind)) if node.get("type") == "array" and "maxItems" not in node
    ]
    assert unbounded == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_stay_small(name: str) -> None:
    assert len(FILES[name].encode()) <= crd.SIZE_LIMIT


def test_names_and_subresources() -> None:
    dapp, machine_type = (DEFINITIONS[kind]["spec"] for kind in ("DistributedApp", "MachineType"))
    assert (dapp["names"]["shortNames"], dapp["scope"]) == (["dapp"], "Namespaced")
    assert (machine_type["names"]["shortNames"], machine_type["scope"]) == (["mt"], "Cluster")
    version = dapp["versions"][0]
    assert version["subresources"]["status"] == {}
    columns = [each["name"] for each in version["additionalPrinterColumns"] if not each.get("priority")]
    assert columns == ["Ready", "Reason", "Replicas", "GPUs", "Machine", "URL", "Age"]
    assert DEFINITIONS["DistributedApp"]["metadata"]["name"] == f"{dapp['names']['plural']}.{dapp['group']}"


@KINDS
def test_paths_lead_to_fields(kind: str) -> None:
    version = DEFINITIONS[kind]["spec"]["versions"][0]
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    paths += version["subresources"].get("scale", {}).values()
    known = {place for place, _ in nodes(schema_of(kind))} | {".metadata.creationTimestamp"}
    for path in paths:
        head, _, tail = path.partition("[?(@.type==")
        assert head in known, path
        if tail:
            wanted, _, field = tail.partition(")].")
            assert wanted.strip('"') in {*APP_CONDITIONS, "Available"}
            assert f"{head}[].{field}" in known, path


def test_conditions_are_a_list_map() -> None:
    status = schema_of("DistributedApp")["properties"]["status"]["properties"]
    for field, key in (("conditions", "type"), ("groups", "name")):
        assert status[field]["x-kubernetes-list-type"] == "map"
        assert status[field]["x-kubernetes-list-map-keys"] == [key]
        assert key in status[field]["items"]["required"]


@pytest.mark.parametrize("name", sorted(GOOD))
def test_good_manifests(name: str) -> None:
    document = GOOD[name]
    jsonschema_rs.validator_for(as_the_server_sees_it(schema_of(document["kind"]))).validate(document)
    MODELS[document["kind"]].model_validate(document, by_name=False)


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_manifests(name: str) -> None:
    document, field = BAD[name]
    validator = jsonschema_rs.validator_for(as_the_server_sees_it(schema_of(document["kind"])))
    said = "\n".join(f"{error.instance_path} {error.message}" for error in validator.iter_errors(document))
    assert field in said
    with pytest.raises(ValidationError, match=field):
        MODELS[document["kind"]].model_validate(document, by_name=False)


@pytest.mark.parametrize("rule", sorted(CROSS_FIELD))
def test_models_hold_the_rules_of_cel(rule: str) -> None:
    document, field = CROSS_FIELD[rule]
    assert [message for message in cel_messages("DistributedApp") if message.startswith(rule)]
    jsonschema_rs.validator_for(as_the_server_sees_it(schema_of("DistributedApp"))).validate(document)
    with pytest.raises(ValidationError, match=field):
        DistributedApp.model_validate(document, by_name=False)


def test_every_rule_has_its_sample() -> None:
    # A manifest without image and source is good for `drumline run app.yaml`; only the cluster needs one.
    unseen = [
        message
        for message in cel_messages("DistributedApp") | cel_messages("MachineType")
        if not message.startswith((*CROSS_FIELD, "spec.image is missing"))
    ]
    assert unseen == []


def test_a_variable_twice_is_refused() -> None:
    assert schema_of("DistributedApp")["properties"]["spec"]["properties"]["env"]["x-kubernetes-list-map-keys"] == [
        "name"
    ]
    with pytest.raises(ValidationError, match="A: set more than once"):
        DistributedApp.model_validate(app(env=[{"name": "A"}, {"name": "A", "value": "x"}]))


def test_statuses_validate_against_the_schema() -> None:
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "Serving",
        "message": "",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    full = {
        "DistributedApp": DistributedAppStatus.model_validate(
            {"conditions": [condition], "groups": [{"name": "a", "readyRanks": 2}], "lastFailure": {"rank": 1}}
        ),
        "MachineType": MachineTypeStatus.model_validate({"conditions": [condition], "allocatableGPUs": 8}),
    }
    for kind, status in full.items():
        schema = as_the_server_sees_it(schema_of(kind))["properties"]["status"]
        jsonschema_rs.validator_for(schema).validate(status.model_dump(by_alias=True, exclude_none=True))


def test_the_files_are_up_to_date() -> None:
    assert crd.main(["--check", "--folder", str(ROOT / "crds")]) == 0


def test_a_stale_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert crd.main(["--write", "--folder", str(tmp_path)]) == 0
    assert crd.main(["--check", "--folder", str(tmp_path)]) == 0
    stale = tmp_path / "drumline.dev_machinetypes.yaml"
    stale.write_text(stale.read_text() + "\n")
    assert crd.main(["--check", "--folder", str(tmp_path)]) == 1
    assert str(stale) in capsys.readouterr().err


def test_a_union_that_no_schema_can_say() -> None:
    class Odd(BaseModel):
        value: int | list[int]

    with pytest.raises(TypeError, match=r"Odd\.value"):
        structural(Odd, {}, {})
