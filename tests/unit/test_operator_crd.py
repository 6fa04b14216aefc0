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
from drumline.api.v1alpha1 import API_VERSION, DistributedApp, MachineType
from drumline_operator import crd
from drumline_operator.schema import structural

ROOT = Path(__file__).parents[2]
FILES = crd.custom_resource_definitions()
DEFINITIONS = {yaml.safe_load(text)["spec"]["names"]["kind"]: yaml.safe_load(text) for text in FILES.values()}
MODELS: dict[str, type[BaseModel]] = {"DistributedApp": DistributedApp, "MachineType": MachineType}
#: The same manifests that tests/contract gives to a real API server.
GOOD, BAD = (
    yaml.safe_load((ROOT / "tests" / "data" / "manifests" / f"{name}.yaml").read_text()) for name in ("good", "bad")
)
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


def manifest(sample: dict[str, Any]) -> dict[str, Any]:
    """The whole manifest of a sample."""
    kind = "MachineType" if "machine" in sample else "DistributedApp"
    spec = sample.get("machine", sample.get("app"))
    whole = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": sample.get("name", "x")}}
    return whole if spec is None else {**whole, "spec": spec}


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


@pytest.mark.parametrize("name", GOOD)
def test_good_manifests(name: str) -> None:
    document = manifest(GOOD[name])
    jsonschema_rs.validator_for(as_the_server_sees_it(schema_of(document["kind"]))).validate(document)
    MODELS[document["kind"]].model_validate(document, by_name=False)


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests(name: str) -> None:
    """Refused by the schema, or there is a rule of CEL; by the models in any case."""
    sample, document = BAD[name], manifest(BAD[name])
    validator = jsonschema_rs.validator_for(as_the_server_sees_it(schema_of(document["kind"])))
    ruled = [message for message in cel_messages(document["kind"]) if sample["cure"] in message]
    twice = sample["cure"] == "Duplicate value"  # a list that is a map, which JSON schema cannot say
    assert ruled or twice or not validator.is_valid(document)
    # A manifest without image and source is good for `drumline run app.yaml`; only the cluster needs one.
    if sample["field"] != "spec.image" or document["spec"].get("image") is not None:
        with pytest.raises(ValidationError):
            MODELS[document["kind"]].model_validate(document, by_name=False)


@KINDS
def test_every_rule_has_its_sample(kind: str) -> None:
    cures = [each["cure"] for each in BAD.values()]
    assert [message for message in cel_messages(kind) if not any(cure in message for cure in cures)] == []


def test_a_form_says_its_cure_everywhere() -> None:
    """The same sentence from the API server and from the models."""
    spec = schema_of("DistributedApp")["properties"]["spec"]["properties"]
    (rule,) = spec["workerClass"]["x-kubernetes-validations"]
    assert rule["rule"] == f"self.matches(r'{spec['workerClass']['pattern']}')"
    with pytest.raises(ValidationError, match=rule["message"]):
        DistributedApp.model_validate(manifest(BAD["a class without its module"]), by_name=False)
    # What a pattern of Python's own would let through.
    with pytest.raises(ValidationError):
        DistributedApp.model_validate(manifest({"app": {"image": "a:1", "workerClass": "app:W\n"}}), by_name=False)


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
    chart = ROOT / "charts" / "drumline" / "templates" / "crds"
    assert crd.main(["--check", "--folder", str(ROOT / "crds"), "--chart", str(chart)]) == 0


@pytest.mark.parametrize("which", ["crds", "chart"])
def test_a_stale_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    folders = ["--folder", str(tmp_path / "crds"), "--chart", str(tmp_path / "chart")]
    assert crd.main(["--write", *folders]) == 0
    assert crd.main(["--check", *folders]) == 0
    stale = tmp_path / which / "drumline.dev_machinetypes.yaml"
    stale.write_text(stale.read_text() + "\n")
    assert crd.main(["--check", *folders]) == 1
    assert str(stale) in capsys.readouterr().err


def test_a_union_that_no_schema_can_say() -> None:
    class Odd(BaseModel):
        value: int | list[int]

    with pytest.raises(TypeError, match=r"Odd\.value"):
        structural(Odd, {}, {})
