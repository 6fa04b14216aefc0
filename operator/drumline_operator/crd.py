"""The CustomResourceDefinitions, made from the models of ``drumline.api``: ``python -m drumline_operator.crd --write``.

They are written twice: as they are, and as templates of the Helm chart. The functions are pure; only the command at the
end touches files. Rules across fields are CEL, so that
the API server itself refuses a wrong manifest, with a message that names the field and the cure. The models hold the same
rules in Python, for what slips past CEL (``tests/unit/test_operator_crd.py`` compares the two).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from drumline.api.status import DistributedAppStatus, MachineTypeStatus
from drumline.api.v1alpha1 import GROUP, TAKEN, DistributedAppSpec, MachineTypeSpec
from drumline_operator.schema import Rule, structural

#: kubectl keeps the last applied manifest in an annotation, whose limit is 256 KiB.
SIZE_LIMIT: Final = 64 << 10

_APP_NAME: Final = (
    Rule(
        "size(self.metadata.name) <= 48",
        "metadata.name must be at most 48 characters (names of pods and Services add to it); shorten it",
    ),
    Rule(
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter and hold only a-z, 0-9 and '-' (a Service gets this name); rename it",
    ),
)
_MACHINE_NAME: Final = (
    Rule(
        "size(self.metadata.name) <= 63",
        "metadata.name must be at most 63 characters (apps name it in spec.machineType); shorten it",
    ),
)
# Equality across types is an error in some implementations of CEL.
_ZERO: Final = "(has(self.{0}) && (type(self.{0}) == int ? self.{0} == 0 : self.{0} == '0%'))"
RULES: Final[Mapping[str, Sequence[Rule]]] = {
    "DistributedAppSpec": (
        Rule("has(self.image) || has(self.source)", "spec.image is missing; set spec.image, spec.source, or both"),
        Rule(
            "!has(self.worldSize) || self.numGPUs == 0 || self.worldSize == self.numGPUs",
            "spec.worldSize is for CPU apps (numGPUs: 0); with GPUs it is numGPUs: remove worldSize",
        ),
        Rule(
            "self.numGPUs > 0 || !has(self.communication) || !has(self.communication.backend)"
            " || self.communication.backend != 'NCCL'",
            "spec.communication.backend NCCL needs numGPUs > 0; use Gloo for CPU apps",
        ),
        Rule(
            "self.numGPUs > 0 || !has(self.gpu) || !has(self.gpu.allocation) || self.gpu.allocation != 'ResourceClaim'",
            "spec.gpu.allocation ResourceClaim needs numGPUs > 0; remove spec.gpu from CPU apps",
        ),
        Rule(
            "!has(self.resources) || !((has(self.gpu) && has(self.gpu.resourceName) ?"
            " ['nvidia.com/gpu', self.gpu.resourceName] : ['nvidia.com/gpu']).exists(name,"
            " (has(self.resources.limits) && name in self.resources.limits)"
            " || (has(self.resources.requests) && name in self.resources.requests)))",
            "spec.resources: GPUs are asked for with numGPUs; remove them here (nvidia.com/gpu or gpu.resourceName)",
        ),
    ),
    "Source": (
        Rule(
            "[has(self.configMap), has(self.git), has(self.persistentVolumeClaim)].filter(x, x).size() == 1",
            "spec.source: set exactly one of configMap, git, persistentVolumeClaim",
        ),
    ),
    "Gpu": (
        Rule(
            "!has(self.allocation) || self.allocation != 'ResourceClaim' || has(self.resourceClaimTemplateName)",
            "spec.gpu.resourceClaimTemplateName is required when spec.gpu.allocation is ResourceClaim; set it",
        ),
    ),
    "ModelCache": tuple(
        Rule(
            f"!has(self.{field}) || !self.{field}.matches('^({TAKEN})$')",
            f"spec.modelCache.{field} is a folder that the pod needs for something else; use /data",
        )
        for field in ("mountPath", "compileCachePath")
    ),
    "EnvVar": (
        Rule("!(has(self.value) && has(self.valueFrom))", "env: set value or valueFrom of a variable, not both"),
    ),
    "Auth": (
        Rule(
            "!has(self.type) || self.type != 'APIKey' || has(self.secretRef)",
            "spec.serving.auth.secretRef is required when its type is APIKey; name a Secret with an entry api-keys",
        ),
    ),
    "Rollout": (
        Rule(
            "!has(self.type) || self.type != 'Recreate' || (!has(self.maxSurge) && !has(self.maxUnavailable))",
            "spec.rollout.maxSurge and maxUnavailable do not apply to type Recreate; remove them",
        ),
        Rule(
            f"!({_ZERO.format('maxSurge')} && {_ZERO.format('maxUnavailable')})",
            "spec.rollout.maxSurge and maxUnavailable cannot both be 0: no pod could be replaced; set one to 1",
        ),
    ),
}
_LIST_KEYS: Final = {"Condition": "type", "GroupStatus": "name", "EnvVar": "name"}

_HEADER: Final = "# Made by `make crds` from worker/drumline/api; do not edit.\n"
_TEMPLATE: Final = """\
{{{{- /* {header} */}}}}
{{{{- if .Values.crds.install }}}}
apiVersion: {version}
kind: CustomResourceDefinition
metadata:
  name: {name}
  labels:
    {{{{- include "drumline.labels" . | nindent 4 }}}}
  {{{{- if .Values.crds.keep }}}}
  annotations:
    helm.sh/resource-policy: keep
  {{{{- end }}}}
{body}
{{{{- end }}}}
"""
_READY: Final = '.status.conditions[?(@.type=="Ready")]'
_AVAILABLE: Final = '.status.conditions[?(@.type=="Available")]'
_AGE: Final = ("Age", "date", ".metadata.creationTimestamp", 0)
_APP_COLUMNS: Final = (
    ("Ready", "string", f"{_READY}.status", 0),
    ("Reason", "string", f"{_READY}.reason", 0),
    ("Replicas", "string", ".status.summary", 0),
    ("GPUs", "integer", ".spec.numGPUs", 0),
    ("Machine", "string", ".spec.machineType", 0),
    ("URL", "string", ".status.url", 0),
    _AGE,
    ("Worker", "string", ".spec.workerClass", 1),
    ("Revision", "string", ".status.currentRevision", 1),
    ("Restarts", "integer", ".status.groupRestarts", 1),
    ("Message", "string", f"{_READY}.message", 1),
)
_MACHINE_COLUMNS: Final = (
    ("Available", "string", f"{_AVAILABLE}.status", 0),
    ("Nodes", "integer", ".status.nodes", 0),
    ("GPUs", "integer", ".status.allocatableGPUs", 0),
    ("Aliases", "string", ".spec.aliases", 0),
    _AGE,
    ("Message", "string", f"{_AVAILABLE}.message", 1),
)


def distributed_app() -> dict[str, Any]:
    """Return the CustomResourceDefinition of DistributedApp."""
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    names = ("DistributedApp", "distributedapps", "dapp")
    title = "N ranks per replica behind invoke and stream endpoints."
    schema = _root(title, _APP_NAME, DistributedAppSpec, DistributedAppStatus)
    return _definition(names, "Namespaced", schema, _APP_COLUMNS, {"status": {}, "scale": scale})


def machine_type() -> dict[str, Any]:
    """Return the CustomResourceDefinition of MachineType."""
    schema = _root("A kind of machine that apps ask for by name.", _MACHINE_NAME, MachineTypeSpec, MachineTypeStatus)
    return _definition(("MachineType", "machinetypes", "mt"), "Cluster", schema, _MACHINE_COLUMNS, {"status": {}})


def custom_resource_definitions() -> dict[str, str]:
    """Return the YAML of every CustomResourceDefinition, by file name."""
    found = {}
    for each in (distributed_app(), machine_type()):
        text = yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        found[f"{GROUP}_{each['spec']['names']['plural']}.yaml"] = _HEADER + text
    return found


def chart_templates() -> dict[str, str]:
    """Return the same as templates of the chart, by file name.

    The chart's values ``crds.install`` and ``crds.keep`` decide whether they are part of a release, and whether they stay
    when it is removed: with a definition go all its objects.
    """
    found = {}
    for name, text in custom_resource_definitions().items():
        definition = yaml.safe_load(text)
        metadata = definition["metadata"]
        body = yaml.dump({"spec": definition["spec"]}, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        found[name] = _TEMPLATE.format(
            header=_HEADER.removeprefix("# ").rstrip(),
            name=metadata["name"],
            version=definition["apiVersion"],
            body=body.replace("{{", '{{ "{{" }}').rstrip(),
        )
    return found


def _root(description: str, names: Sequence[Rule], spec: type, status: type) -> dict[str, Any]:
    versioned = "as in every Kubernetes object"
    return {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "x-kubernetes-validations": [rule.to_dict() for rule in names],
        "properties": {
            "apiVersion": {"type": "string", "description": f"version of this shape, {versioned}"},
            "kind": {"type": "string", "description": f"kind of this object, {versioned}"},
            "metadata": {"type": "object"},  # the API server takes no description here: it has its own
            "spec": {**structural(spec, RULES, _LIST_KEYS), "description": "what is wanted"},
            "status": {**structural(status, RULES, _LIST_KEYS), "description": "what is; written by the operator"},
        },
    }


def _definition(
    names: tuple[str, str, str],
    scope: str,
    schema: Mapping[str, Any],
    columns: Sequence[tuple[str, str, str, int]],
    subresources: Mapping[str, Any],
) -> dict[str, Any]:
    kind, plural, short = names
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "drumline"}},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                # Not `all`: `kubectl delete all --all` should not take the apps along.
                "categories": ["drumline"],
            },
            "versions": [
                {
                    "name": "v1alpha1",
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [
                        {"name": name, "type": type, "jsonPath": path, **({"priority": priority} if priority else {})}
                        for name, type, path, priority in columns
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Repeats what is used twice: an anchor is hard to read, and some tools refuse it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files; 1 when they are not what the models say."""
    parser = argparse.ArgumentParser(prog="python -m drumline_operator.crd", description="CustomResourceDefinitions")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the files")
    what.add_argument("--check", action="store_true", help="exit 1 when a file is not up to date")
    parser.add_argument("--folder", type=Path, default=Path("crds"), help="where they are (default: crds)")
    templates = Path("charts/drumline/templates/crds")
    parser.add_argument("--chart", type=Path, default=templates, help=f"where the chart's are (default: {templates})")
    options = parser.parse_args(arguments)
    wanted: dict[Path, str] = {options.folder / name: text for name, text in custom_resource_definitions().items()}
    wanted |= {options.chart / name: text for name, text in chart_templates().items()}
    stale = []
    for path, text in wanted.items():
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what worker/drumline/api says; run `make crds`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
