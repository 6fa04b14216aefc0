"""Whatever values the schema allows, what is rendered is valid. The strategy is made from the schema itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft7Validator

from .conftest import Helm, Object, one, pod_specs
from .test_values import SCHEMA, TOOL

#: Each is a run of Helm, so few, and what fails is not made smaller: it can be read as it is.
EXAMPLES = 20
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
#: What Kubernetes itself says about names and labels; the schema leaves it to the API server.
KEY = st.from_regex(r"\A([a-z]{1,8}\.example/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?\Z")
#: Without what YAML does not have: control characters and those that are none (U+FFFE, U+FFFF, ...).
TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="\u2028\u2029\ufeff"), max_size=20
)
#: Objects of Kubernetes that the schema does not look into.
FREE: Mapping[str, st.SearchStrategy[Any]] = {
    "affinity": st.just({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
    "valueFrom": st.just({"fieldRef": {"fieldPath": "metadata.name"}}),
    "namespaceSelector": st.just({}),
    "podSelector": st.just({"matchLabels": {"a": "b"}}),
    "ipBlock": st.just({"cidr": "10.0.0.0/8"}),
    "global": st.just({}),
}
VALID = Draft7Validator(SCHEMA)


def strategy(node: Mapping[str, Any], name: str = "") -> st.SearchStrategy[Any]:
    """Values that a part of the schema allows."""
    node = TOOL["resolved"](node, SCHEMA)
    if "enum" in node:
        return st.sampled_from(node["enum"])
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    return st.one_of([of_type(type, node, name) for type in types])


def of_type(type: str, node: Mapping[str, Any], name: str) -> st.SearchStrategy[Any]:
    match type:
        case "boolean":
            return st.booleans()
        case "integer" | "number":
            return st.integers(node.get("minimum", 0), node.get("maximum", 1 << 30))
        case "string" if "pattern" in node:
            short = st.from_regex(re.compile(node["pattern"], re.ASCII), fullmatch=True)
            return short.filter(lambda text: len(text) <= node.get("maxLength", 300) and "\n" not in text)
        case "string":
            return TEXT.filter(lambda text: len(text) >= node.get("minLength", 0))
        case "array":
            items = strategy(node["items"], name)
            most = min(3, node.get("maxItems", 3))
            unique = str if node.get("uniqueItems") else None
            return st.lists(items, min_size=node.get("minItems", 0), max_size=most, unique_by=unique)
        case _:
            return of_object(node, name)


def of_object(node: Mapping[str, Any], name: str) -> st.SearchStrategy[Any]:
    if "properties" in node:
        parts = {key: strategy(child, key) for key, child in node["properties"].items()}
        required = {key: parts.pop(key) for key in node.get("required", ())}
        return st.fixed_dictionaries(required, optional=parts)
    if isinstance(node.get("additionalProperties"), dict):
        names = strategy({"type": "string", **node["propertyNames"]}) if "propertyNames" in node else KEY
        return st.dictionaries(names, strategy(node["additionalProperties"]), max_size=3)
    return FREE[name]


@pytest.mark.timeout(300)
@given(values=strategy(SCHEMA).filter(VALID.is_valid), known=st.booleans(), namespace=st.sampled_from(["a", "y", "0"]))
@settings(max_examples=EXAMPLES, phases=PHASES)
def test_valid_values_make_valid_manifests(
    helm: Helm, conform: Callable[[list[Object]], None], values: dict[str, Any], known: bool, namespace: str
) -> None:
    items = helm.render(values, known=known, namespace=namespace)
    conform(items)
    deployment = one(items, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for spec in pod_specs(items):
        assert spec["securityContext"]["runAsNonRoot"]
    assert {each["metadata"].get("namespace", namespace) for each in items if each["kind"] != "RoleBinding"} == {
        namespace
    }
    keys = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in items]
    assert len(keys) == len(set(keys))
    assert not [each for each in keys if len(each[-1]) > 63]
