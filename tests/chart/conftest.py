"""The chart, rendered by the pinned Helm. The first run on a machine builds it with Go; without Go these tests are skipped."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.cluster import schemas
from e2e.cluster.errors import ClusterError
from e2e.cluster.store import Store
from jsonschema_rs import Draft7Validator

from drumline_operator.crd import custom_resource_definitions

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "drumline"
RELEASE, NAMESPACE = "drumline", "drumline-system"
#: Of the Deployment and what belongs to it.
NAME = "drumline-operator"
#: What the API server knows once the CustomResourceDefinitions are there.
KNOWN = "drumline.dev/v1alpha1/MachineType"

Object = dict[str, Any]
# The loader in C is ten times as fast, where there is one.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Refused(Exception):
    """Helm did not render the chart; the message is Helm's."""


@dataclass(frozen=True)
class Helm:
    """The program, and what it is told about every release."""

    program: Path
    home: Path

    def run(self, *arguments: str, stdin: str = "") -> str:
        homes = {f"HELM_{name}_HOME": str(self.home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        line = [str(self.program), *arguments]
        result = subprocess.run(line, input=stdin, capture_output=True, text=True, env=homes, timeout=60, check=False)
        if result.returncode:
            raise Refused(result.stderr)
        return result.stdout

    def render(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
        known: bool = True,
    ) -> list[Object]:
        """All objects of a release, hooks too. ``known``: the definitions are in the cluster already."""
        # Helm reads YAML, which has no surrogates.
        given = json.dumps(values or {}, ensure_ascii=False)
        options = [f"--namespace={namespace}", "--values=-", *([f"--api-versions={KNOWN}"] if known else [])]
        text = self.run("template", release, str(CHART), *options, stdin=given)
        return [each for each in yaml.load_all(text, Loader=_LOADER) if each]

    def notes(self, values: Mapping[str, Any] | None = None) -> str:
        options = [f"--namespace={NAMESPACE}", "--values=-", "--dry-run=client"]
        return self.run("install", RELEASE, str(CHART), *options, stdin=json.dumps(values or {})).partition("NOTES:")[2]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(program("helm"), tmp_path_factory.mktemp("helm"))


def program(name: str) -> Path:
    """A pinned program, built if it is not there yet."""
    store = Store()
    try:
        store.ensure([name])
    except ClusterError as error:
        pytest.skip(str(error))
    return store.program(name)


@pytest.fixture(scope="session")
def defaults(helm: Helm) -> list[Object]:
    return helm.render()


@pytest.fixture(scope="session")
def conform() -> Callable[[list[Object]], None]:
    """Check objects strictly against the schemas of the pinned Kubernetes and of our definitions."""
    try:
        specification = Store().specification()
    except ClusterError as error:
        pytest.skip(str(error))
    definitions = json.loads(specification.read_text())["definitions"]
    found: dict[str, Draft7Validator] = {}
    ours: dict[str, Any] = dict(MONITORS)
    for text in custom_resource_definitions().values():
        ours |= dict(schemas.of_custom_resource(yaml.safe_load(text), definitions))
    kinds = {
        schemas.file_name(each["group"], each["version"], each["kind"]): (name, definition)
        for name, definition in definitions.items()
        for each in definition.get("x-kubernetes-group-version-kind", [])
    }

    def validator(item: Object) -> Draft7Validator:
        group, _, version = item["apiVersion"].rpartition("/")
        file = schemas.file_name(group, version, item["kind"])
        if file not in found:
            if file not in ours:
                name, definition = kinds[file]
                ours[file] = schemas.strict(definition, definitions, (name,))
            found[file] = Draft7Validator(ours[file])
        return found[file]

    def check(items: list[Object]) -> None:
        wrong = [
            f"{item['kind']} {item['metadata']['name']}: {'.'.join(map(str, error.instance_path))}: {error.message}"
            for item in items
            for error in validator(item).iter_errors(item)
        ]
        assert not wrong, "\n".join(wrong)

    return check


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_STRING = {"type": "string"}
_STRINGS = {"type": "object", "additionalProperties": _STRING}
_DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
_ENDPOINT = _closed(["port"], port=_STRING, path=_STRING, interval=_DURATION, scrapeTimeout=_DURATION)
_EXPRESSION = _closed(["key", "operator"], key=_STRING, operator={"enum": ["Exists"]})
_SELECTOR = _closed([], matchLabels=_STRINGS, matchExpressions={"type": "array", "items": _EXPRESSION})


def _monitor(**spec: Any) -> dict[str, Any]:
    metadata = _closed(["name"], name=_STRING, namespace=_STRING, labels=_STRINGS)
    return _closed(
        ["metadata", "spec"],
        apiVersion=_STRING,
        kind=_STRING,
        metadata=metadata,
        spec=_closed(["selector"], selector=_SELECTOR, **spec),
    )


#: The part of the Prometheus operator's objects that the chart uses.
MONITORS: dict[str, dict[str, Any]] = {
    "servicemonitor-monitoring-v1.json": _monitor(endpoints={"type": "array", "items": _ENDPOINT}),
    "podmonitor-monitoring-v1.json": _monitor(
        namespaceSelector=_closed([], any={"type": "boolean"}),
        podTargetLabels={"type": "array", "items": _STRING},
        podMetricsEndpoints={"type": "array", "items": _ENDPOINT},
    ),
}


def one(items: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or the one of this name."""
    found = [each for each in items if each["kind"] == kind and (not name or each["metadata"]["name"] == name)]
    assert len(found) == 1, f"{kind} {name}: {[each['metadata']['name'] for each in found]}"
    return found[0]


def keys(items: list[Object]) -> list[tuple[str, str]]:
    return sorted((each["kind"], each["metadata"]["name"]) for each in items)


def ordinary(items: list[Object]) -> list[Object]:
    return [each for each in items if "helm.sh/hook" not in each["metadata"].get("annotations", {})]


def pod(items: list[Object]) -> Object:
    found: Object = one(items, "Deployment")["spec"]["template"]
    return found


def container(items: list[Object]) -> Object:
    found: Object = pod(items)["spec"]["containers"][0]
    return found


def variable(items: list[Object], name: str) -> Any:
    found = {each["name"]: each for each in container(items)["env"]}[f"DRUMLINE_OPERATOR_{name}"]
    return found.get("value", found.get("valueFrom"))


def pod_specs(items: list[Object]) -> Iterator[Object]:
    for each in items:
        if each["kind"] == "Pod":
            yield each["spec"]
        elif each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
