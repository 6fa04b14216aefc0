"""The CustomResourceDefinitions in a real API server: what it takes, what it refuses and in which words.

The manifests are in ``tests/data/manifests``. The models give the same verdict on each (``tests/unit/test_operator_crd.py``
compares them with the schema, without an API server).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.cluster.api import Api, ApiError
from e2e.cluster.envtest import EnvTest
from e2e.cluster.process import command
from pydantic import ValidationError

from drumline.api.manifests import sentences
from drumline.api.v1alpha1 import API_VERSION, MachineType
from drumline.errors import ConfigurationError
from drumline_operator.plan import validated
from drumline_operator.settings import OperatorSettings

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "manifests"
GOOD, BAD = (yaml.safe_load((DATA / f"{name}.yaml").read_text()) for name in ("good", "bad"))
PLURALS = {"DistributedApp": "namespaces/default/distributedapps", "MachineType": "machinetypes"}
EXAMPLES = sorted((ROOT / "examples").glob("*/app.yaml"))
SETTINGS = OperatorSettings(worker_image="base:1")


def manifest(sample: dict[str, Any]) -> dict[str, Any]:
    """The whole manifest of a sample."""
    kind = "MachineType" if "machine" in sample else "DistributedApp"
    spec = sample.get("machine", sample.get("app"))
    whole = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": sample.get("name", "x")}}
    return whole if spec is None else {**whole, "spec": spec}


@pytest.fixture(scope="module")
def api(api_server: EnvTest) -> Iterator[Api]:
    with api_server.api() as found:
        yield found


def create(api: Api, document: dict[str, Any]) -> None:
    """What `kubectl create --dry-run=server` does: unknown fields are errors."""
    path = f"/apis/{API_VERSION}/{PLURALS[document['kind']]}"
    api.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", document)


def judged_by_models(document: dict[str, Any]) -> str:
    """What the models say: nothing about a good one."""
    try:
        if document["kind"] == "DistributedApp":
            validated(document, SETTINGS)
        else:
            MachineType.model_validate(document, by_name=False)
    except ConfigurationError as error:
        return str(error)
    except ValidationError as error:
        return "\n".join(sentences(error, MachineType))
    return ""


def test_there_are_enough() -> None:
    assert len(GOOD) >= 40
    assert len(BAD) >= 60
    assert len(EXAMPLES) >= 14
    for samples in (GOOD, BAD):
        assert len({json.dumps(manifest(each), sort_keys=True) for each in samples.values()}) == len(samples)


@pytest.mark.parametrize("name", GOOD)
def test_good_manifests_are_taken(api: Api, name: str) -> None:
    document = manifest(GOOD[name])
    create(api, document)
    assert judged_by_models(document) == ""


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_manifests_of_the_examples_are_taken_as_they_are(api: Api, file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    create(api, document)
    assert judged_by_models(document) == ""
    # Who applies it gets the real model, not the tiny one: the class's default.
    assert "tiny" not in json.dumps(document)


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests_are_refused_with_the_field_and_the_cure(api: Api, name: str) -> None:
    sample = BAD[name]
    with pytest.raises(ApiError) as refused:
        create(api, manifest(sample))
    said = str(refused.value)
    assert refused.value.status in {400, 422}
    assert sample["field"] in said
    assert sample["cure"] in said
    # The models name at least the last part: where two fields do not fit, they say so at the place of both.
    assert re.split(r"\.(?=[^\]])", sample["field"])[-1] in judged_by_models(manifest(sample))


def test_applied_twice_nothing_changes(api_server: EnvTest, kubectl: Path, tmp_path: Path) -> None:
    """With plain `kubectl apply`, which compares with its annotation: defaults must not come back as changes."""
    documents = []
    for number, sample in enumerate(GOOD.values()):
        document = manifest(sample)
        document["metadata"] = {"name": f"twice-{number}"}
        documents.append(document)
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    environment = api_server.environment()
    try:
        command(kubectl, "apply", "-f", file, env=environment)
        before = command(kubectl, "get", "-f", file, "--output=json", env=environment)
        for arguments, words in ((("apply", "-f", file), "unchanged"), (("diff", "-f", file), "")):
            lines = command(kubectl, *arguments, env=environment).splitlines()
            assert len(lines) == (len(documents) if words else 0)
            assert all(line.endswith(words) for line in lines)
        after = command(kubectl, "get", "-f", file, "--output=json", env=environment)
        assert [each["metadata"]["resourceVersion"] for each in json.loads(before)["items"]] == [
            each["metadata"]["resourceVersion"] for each in json.loads(after)["items"]
        ]
    finally:
        command(kubectl, "delete", "--ignore-not-found", "-f", file, env=environment)


def test_the_definitions_applied_twice_do_not_change(api_server: EnvTest, kubectl: Path) -> None:
    lines = command(kubectl, "apply", "-f", ROOT / "crds", env=api_server.environment()).splitlines()
    assert len(lines) == len(list((ROOT / "crds").iterdir()))
    assert all(line.endswith(" unchanged") for line in lines)


@pytest.mark.parametrize("kind", ["dapp", "mt"])
def test_kubectl_explains_every_field(api_server: EnvTest, kubectl: Path, kind: str) -> None:
    tree = command(kubectl, "explain", kind, "--recursive", env=api_server.environment())
    assert tree.count("\n") > 15
    template = "--output=plaintext-openapiv2"
    for place in ("", ".spec", ".status"):
        assert "<empty>" not in command(kubectl, "explain", f"{kind}{place}", template, env=api_server.environment())
    document = json.loads(api_server_schema(api_server, kubectl))
    root = document["components"]["schemas"][
        f"dev.drumline.v1alpha1.{'DistributedApp' if kind == 'dapp' else 'MachineType'}"
    ]
    silent = list(fields_without_words(root))
    assert silent == []


def api_server_schema(api_server: EnvTest, kubectl: Path) -> str:
    """The OpenAPI document from which `kubectl explain` reads."""
    return command(kubectl, "get", "--raw", f"/openapi/v3/apis/{API_VERSION}", env=api_server.environment())


def fields_without_words(schema: dict[str, Any], place: str = "") -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        if not (part.get("description") or "").strip():
            yield f"{place}.{name}"
        yield from fields_without_words(part, f"{place}.{name}")
    for below in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(below, dict):
            yield from fields_without_words(below, f"{place}[]")


def test_names_columns_and_scale(api_server: EnvTest, kubectl: Path, tmp_path: Path) -> None:
    environment = api_server.environment()
    file = tmp_path / "app.yaml"
    file.write_text(yaml.safe_dump({**manifest(GOOD["minimal"]), "metadata": {"name": "columns"}}))
    command(kubectl, "apply", "-f", file, env=environment)
    try:
        header = command(kubectl, "get", "dapp", "columns", env=environment).splitlines()[0]
        assert header.split() == ["NAME", "READY", "REASON", "REPLICAS", "GPUS", "MACHINE", "URL", "AGE"]
        command(kubectl, "scale", "dapp/columns", "--replicas=3", env=environment)
        found = json.loads(command(kubectl, "get", "dapp", "columns", "--output=json", env=environment))
        assert found["spec"]["replicas"] == 3
        refused = subprocess.run(
            [kubectl, "scale", "dapp/columns", "--replicas=1001"], env=environment, capture_output=True, text=True
        )
        assert "less than or equal to 1000" in refused.stderr
    finally:
        command(kubectl, "delete", "-f", file, env=environment)
