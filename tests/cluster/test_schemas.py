"""Schemas for kubeconform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import schemas
from jsonschema_rs import Draft202012Validator, meta

META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
DEFINITIONS: dict[str, Any] = {
    META: {"type": "object", "properties": {"name": {"type": "string"}}},
    "api.resource.Quantity": {"type": "string"},
    "Pod": {
        "type": "object",
        "properties": {
            "metadata": {"$ref": f"#/definitions/{META}"},
            "memory": {"$ref": "#/definitions/api.resource.Quantity"},
            "port": {"type": "string", "format": "int-or-string"},
            "inner": {"$ref": "#/definitions/Pod"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "x-kubernetes-group-version-kind": [{"group": "", "version": "v1", "kind": "Pod"}],
    },
    "DeleteOptions": {
        "x-kubernetes-group-version-kind": [
            {"group": group, "version": "v1", "kind": "DeleteOptions"} for group in ("", "apps")
        ]
    },
}
CRD: dict[str, Any] = {
    "spec": {
        "group": "drumline.dev",
        "names": {"kind": "Thing"},
        "versions": [
            {
                "name": "v1alpha1",
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {"type": "object", "properties": {"size": {"type": "integer"}}},
                            "free": {
                                "type": "object",
                                "properties": {"a": {"type": "string"}},
                                "x-kubernetes-preserve-unknown-fields": True,
                            },
                        },
                    }
                },
            }
        ],
    }
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "swagger.json").write_text(json.dumps({"definitions": DEFINITIONS}))
    assert schemas.write(tmp_path / "out", tmp_path / "swagger.json", [CRD]) == 2
    return tmp_path / "out"


def errors(path: Path, value: object) -> list[str]:
    schema = json.loads(path.read_text())
    meta.validate(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def test_names_are_what_kubeconform_asks_for(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["pod-v1.json", "thing-drumline-v1alpha1.json"]
    assert schemas.file_name("apps", "v1", "Deployment") == "deployment-apps-v1.json"


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"metadata": {"name": "x"}, "memory": "1Gi", "port": 80, "labels": {"any": "x"}}, ""),
        ({"memory": 1, "port": "http", "inner": {"whatever": 1}}, ""),
        ({"metadata": {"nam": "x"}}, "nam"),
        ({"other": 1}, "other"),
        ({"memory": []}, "is not valid"),
        ({"labels": {"a": 1}}, 'not of type "string"'),
    ],
)
def test_kinds_of_kubernetes(written: Path, value: object, wrong: str) -> None:
    found = errors(written / "pod-v1.json", value)
    assert wrong in found[0] if wrong else found == []


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"apiVersion": "drumline.dev/v1alpha1", "kind": "Thing", "metadata": {"name": "x"}, "spec": {"size": 1}}, ""),
        ({"free": {"a": "x", "b": 1}}, ""),
        ({"spec": {"size": "1"}}, 'not of type "integer"'),
        ({"spec": {"sise": 1}}, "sise"),
        ({"metadata": {"nam": 1}}, "nam"),
    ],
)
def test_custom_resources(written: Path, value: object, wrong: str) -> None:
    found = errors(written / "thing-drumline-v1alpha1.json", value)
    assert wrong in found[0] if wrong else found == []
