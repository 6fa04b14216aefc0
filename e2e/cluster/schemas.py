"""JSON schemas for kubeconform, made from the pinned Kubernetes and from custom resource definitions. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

QUANTITY = {"oneOf": [{"type": "string"}, {"type": "number"}]}
INT_OR_STRING = {"oneOf": [{"type": "string"}, {"type": "integer"}]}
_OBJECT_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def strict(schema: Any, definitions: Mapping[str, Any], above: tuple[str, ...] = ()) -> Any:
    """A schema without references, in which unknown fields are forbidden.

    Args:
        schema: OpenAPI v2 as Kubernetes writes it.
        definitions: What `$ref` may name.
        above: The references that this one is part of; a circle ends in "anything".
    """
    if isinstance(schema, list):
        return [strict(item, definitions, above) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith(".Quantity"):
            return QUANTITY
        return {} if name in above else strict(definitions[name], definitions, (*above, name))
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return INT_OR_STRING
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":  # their names are fields, also one named `$ref`
            result[key] = {name: strict(item, definitions, above) for name, item in value.items()}
        elif not key.startswith("x-kubernetes-"):
            result[key] = strict(value, definitions, above)
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def file_name(group: str, version: str, kind: str) -> str:
    """The name by which kubeconform asks for a kind: the kind, the first part of the group, the version."""
    parts = [kind, *([group.partition(".")[0]] if group else []), version]
    return "-".join(parts).lower() + ".json"


def of_kubernetes(definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """File name and schema of every kind that Kubernetes has."""
    for name, definition in definitions.items():
        kinds = definition.get("x-kubernetes-group-version-kind", [])
        if len(kinds) == 1:  # others, such as DeleteOptions, are no objects
            kind = kinds[0]
            yield file_name(kind["group"], kind["version"], kind["kind"]), strict(definition, definitions, (name,))


def of_custom_resource(definition: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """File name and schema of every version of a CustomResourceDefinition."""
    spec = definition["spec"]
    metadata = strict(definitions[_OBJECT_META], definitions)
    for version in spec["versions"]:
        schema = strict(version["schema"]["openAPIV3Schema"], {})
        schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata}
        yield file_name(spec["group"], version["name"], spec["names"]["kind"]), schema


def write(directory: Path, specification: Path, custom_resources: Iterable[Mapping[str, Any]] = ()) -> int:
    """Write all schemas.

    Args:
        directory: For the files; made if it is not there.
        specification: The `swagger.json` of Kubernetes.
        custom_resources: CustomResourceDefinitions.

    Returns:
        How many.
    """
    definitions = json.loads(specification.read_text())["definitions"]
    found = dict(of_kubernetes(definitions))
    for definition in custom_resources:
        found.update(of_custom_resource(definition, definitions))
    directory.mkdir(parents=True, exist_ok=True)
    for name, schema in found.items():
        (directory / name).write_text(json.dumps(schema, separators=(",", ":")))
    return len(found)
