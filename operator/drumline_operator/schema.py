"""pydantic models -> structural OpenAPI v3 schema, as a CustomResourceDefinition wants it. PURE.

Structural means: no references, every place has a type (or says that it is an integer or a string), and closed objects
are closed by pruning, not by ``additionalProperties: false``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from drumline.api.forms import CURE

_KEPT = (
    "type",
    "description",
    "enum",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)


class Rule(NamedTuple):
    """One CEL rule. ``message`` names the field and the cure."""

    rule: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """Return it as an entry of ``x-kubernetes-validations``."""
        return {"rule": self.rule, "message": self.message}


def structural(
    model: type[BaseModel], rules: Mapping[str, Sequence[Rule]], list_keys: Mapping[str, str]
) -> dict[str, Any]:
    """Return the structural schema of ``model``.

    Args:
        model: the root.
        rules: CEL rules by the name of the model that they judge.
        list_keys: models whose lists are maps, each with the field that is the key.

    Raises:
        TypeError: the models hold something that a structural schema cannot say; the message names the place.
    """
    document = model.model_json_schema(by_alias=True)
    return _Converter(document.get("$defs", {}), rules, list_keys).convert(document, model.__name__, model.__name__)


class _Converter:
    def __init__(
        self, defs: Mapping[str, Any], rules: Mapping[str, Sequence[Rule]], list_keys: Mapping[str, str]
    ) -> None:
        self.defs, self.rules, self.list_keys = defs, rules, list_keys

    def convert(self, node: Mapping[str, Any], place: str, name: str = "") -> dict[str, Any]:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            node = {**self.defs[name], **{key: value for key, value in node.items() if key != "$ref"}}
        if "anyOf" in node:
            return self._any_of(node, place)
        if "const" in node:
            node = {**node, "enum": [node["const"]]}
        if "type" not in node:
            raise TypeError(f"{place}: no type")
        schema = {key: node[key] for key in _KEPT if key in node}
        if CURE in node:
            schema["x-kubernetes-validations"] = [Rule(f"self.matches(r'{node['pattern']}')", node[CURE]).to_dict()]
        if node.get("default") not in (None, [], {}):
            schema["default"] = node["default"]
        match node["type"]:
            case "object":
                self._object(schema, node, place, name)
            case "array":
                schema["items"] = self.convert(node["items"], f"{place}[]")
                if key := self.list_keys.get(node["items"].get("$ref", "").rpartition("/")[2]):
                    schema |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
            case "integer":
                schema.setdefault("format", "int32" if schema.get("maximum", 1 << 40) < 1 << 31 else "int64")
        return schema

    def _object(self, schema: dict[str, Any], node: Mapping[str, Any], place: str, name: str) -> None:
        if "properties" in node:
            schema["properties"] = {
                key: self.convert(value, f"{place}.{key}") for key, value in node["properties"].items()
            }
            if required := [key for key in node.get("required", ()) if "default" not in node["properties"][key]]:
                schema["required"] = required
            if found := self.rules.get(name):
                schema["x-kubernetes-validations"] = [rule.to_dict() for rule in found]
        elif isinstance(node.get("additionalProperties"), dict):
            schema["additionalProperties"] = self.convert(node["additionalProperties"], f"{place}.*")
        else:
            schema["x-kubernetes-preserve-unknown-fields"] = True

    def _any_of(self, node: Mapping[str, Any], place: str) -> dict[str, Any]:
        """An optional value, or an integer or a string: nothing else can be said."""
        parts = [part for part in node["anyOf"] if part.get("type") != "null"]
        rest = {key: value for key, value in node.items() if key != "anyOf"}
        if len(parts) == 1:
            return self.convert({**parts[0], **rest}, place)
        if sorted(str(part.get("type")) for part in parts) != ["integer", "string"]:
            raise TypeError(f"{place}: a structural schema has no unions but of an integer and a string")
        merged: dict[str, Any] = {"x-kubernetes-int-or-string": True}
        for part in [*parts, rest]:
            merged |= {key: part[key] for key in _KEPT if key in part and key != "type"}
        if CURE in rest:
            rule = f"type(self) == int || self.matches(r'{merged['pattern']}')"
            merged["x-kubernetes-validations"] = [Rule(rule, rest[CURE]).to_dict()]
        if rest.get("default") is not None:
            merged["default"] = rest["default"]
        return merged
