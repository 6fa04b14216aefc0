"""Pages of ``docs/reference`` that say what the models and the reasons say: ``python -m drumline_operator.reference``.

``pages`` is pure; only the command at the end touches files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from drumline_operator import crd, reasons
from drumline_operator.troubles import Trouble

_NOTE: Final = "<!-- Made by `make reference` from the models and the reasons; do not edit. -->"
_APP: Final = """\
What to run, on what, and how it is served. Short name `dapp`; `kubectl explain dapp.spec` shows the same text.
[Status](status.md) has the conditions and their reasons.

```yaml
apiVersion: drumline.dev/v1alpha1
kind: DistributedApp
metadata:
  name: sdxl
spec:
  image: ghcr.io/acme/sdxl:1.0
  workerClass: app:SDXLWorker
  numGPUs: 2
  machineType: GPU-H100
```

`metadata.name` is at most 48 characters of `a-z`, `0-9` and `-`, and begins with a letter: the Service gets this name.
Unknown fields are refused by `kubectl apply`, and so is what breaks a rule below. `drumline run app.yaml` reads the same
file.
"""
_MACHINE: Final = """\
A kind of machine that apps ask for by name. Cluster-wide; short name `mt`. Apps without `machineType` run on any node that
has what they ask for.

```yaml
apiVersion: drumline.dev/v1alpha1
kind: MachineType
metadata:
  name: h100
spec:
  aliases: [GPU-H100]
  gpusPerNode: 8
  nodeSelector:
    nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3
  tolerations:
  - key: nvidia.com/gpu
    operator: Exists
    effect: NoSchedule
```

An alias that two MachineTypes have is refused by the app that names it, which says so in its condition `Ready`.
"""
_STATUS: Final = """\
What the operator writes into `status`, and what programs and people may rely on. It is computed anew from what is there,
every time: nothing is remembered in it, and nothing reads it back.

- `kubectl wait --for=condition=Ready dapp/NAME` is the way to wait. Every condition carries `observedGeneration`, so a
  verdict about an earlier spec is not taken for one about yours.
- All conditions of an app are always there. `lastTransitionTime` changes only when `status` does.
- **Reasons are stable**: single CamelCase words, never renamed. Messages are for people and may change.
- A message of trouble ends with what to do, in brackets. [Troubleshooting](../guide/troubleshooting.md) goes by reason.
- There is no `phase`. `kubectl get dapp` shows `Ready` and its reason.

## Conditions of a DistributedApp

| type | True | False |
|---|---|---|
| `Ready` | requests are served by the wanted revision, or `replicas` is 0 | something below is in the way |
| `Available` | as many groups are ready as a rollout needs at least, of whatever revision | fewer are |
| `Progressing` | pods are being made or replaced | all is done (`Complete`), or it is stuck |
| `Scheduled` | every pod has a node | one has none |
| `SourceReady` | image and code are there | one is not |
| `RanksReady` | all ranks of the ready groups passed `setup()` and the warm-up | some did not, or do not exist yet |
| `Suspended` | `spec.suspend` is true | it is false |
| `Failed` | stuck beyond the deadline, or the spec is refused: waiting does not help | nothing has failed for good |

What cannot be judged yet, because a pod waits for a node or because the spec is refused, is `Unknown` with reason `NotKnown`.
A MachineType has one condition, `Available`.
"""
_GOOD: Final = """\
## Reasons when all is well

| reason | in | means |
|---|---|---|
"""
_BAD: Final = """\
## Reasons of trouble

The condition that is in the way has the reason, and so has `Ready` unless enough groups serve anyway. Where two have
one, look at the first of `Scheduled`, `SourceReady`, `RanksReady`.

| reason | in | means | what to do |
|---|---|---|---|
"""
_EVENTS: Final = """\
## Events

`kubectl describe dapp NAME` shows them. A change of `Ready`'s reason is an event with that reason. Besides:

| reason | means |
|---|---|
| `Created`, `Deleted` | a child was made or removed, and why |
| `Updated` | a child was changed; the message is the first difference, e.g. `Deployment: spec.replicas: 9 -> 2` |
| `PodReplaced` | with `failurePolicy.type: RecreatePod`, a pod whose container ended was deleted |
"""
#: Where reasons that are no trouble stand.
PLACES: Final = {
    reasons.SERVING: ("Ready=True",),
    reasons.SCALED_TO_ZERO: ("Ready=True",),
    reasons.SUSPENDED: ("Ready=False", "Suspended=True"),
    reasons.NOT_SUSPENDED: ("Suspended=False",),
    reasons.NOT_FAILED: ("Failed=False",),
    reasons.COMPLETE: ("Progressing=False",),
    reasons.NEW_REVISION: ("Progressing=True", "Ready=False"),
    reasons.SCALING: ("Progressing=True",),
    reasons.STARTING: ("Ready=False", "RanksReady=False"),
    reasons.LOADING_MODEL: ("Ready=False", "RanksReady=False"),
    reasons.PODS_BOUND: ("Scheduled=True",),
    reasons.SOURCE_FOUND: ("SourceReady=True",),
    reasons.RANKS_READY: ("RanksReady=True",),
    reasons.ENOUGH_REPLICAS: ("Available=True",),
    reasons.TOO_FEW_REPLICAS: ("Available=False",),
    reasons.NOT_KNOWN: ("any condition=Unknown",),
    reasons.NODES_FOUND: ("MachineType Available=True",),
    reasons.NO_NODES: ("MachineType Available=False",),
    reasons.DEADLINE: ("Failed=True", "Progressing=False"),
    **dict.fromkeys(
        [reasons.INVALID_SPEC, reasons.NAME_TAKEN, reasons.REFUSED], ("Ready=False", "Progressing=False", "Failed=True")
    ),
}


def pages() -> dict[str, str]:
    """Return the text of every generated page, by file name."""
    return {
        "distributedapp.md": _resource("DistributedApp", _APP, crd.distributed_app()),
        "machinetype.md": _resource("MachineType", _MACHINE, crd.machine_type()),
        "status.md": _status(),
    }


def places(reason: str) -> tuple[str, ...]:
    """Return the verdicts that ``reason`` may stand in, as ``Condition=Status``."""
    if reason in PLACES:
        return PLACES[reason]
    own = Trouble(reason, "").condition
    return tuple(dict.fromkeys([f"{own}=False", "Ready=False", *(["RanksReady=False"] if own != "RanksReady" else [])]))


def _resource(kind: str, words: str, definition: Mapping[str, Any]) -> str:
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = "\n".join(_sections("spec", schema["properties"]["spec"]))
    return f"# {kind}\n\n{_NOTE}\n\n{words}\n{spec}"


def _status() -> str:
    good = [each for each in reasons.MEANINGS if each not in reasons.CURES]
    bad = [each for each in reasons.MEANINGS if each in reasons.CURES]
    parts = [f"# Status\n\n{_NOTE}\n", _STATUS]
    parts.append(_GOOD + _lines(f"| `{each}` | {_in(each)} | {_prose(reasons.MEANINGS[each])} |" for each in good))
    parts.append(
        _BAD
        + _lines(
            f"| `{each}` | {_in(each)} | {_prose(reasons.MEANINGS[each])} | {_prose(reasons.CURES[each])} |"
            for each in bad
        )
    )
    parts.append(_EVENTS)
    for definition, kind in ((crd.distributed_app(), "DistributedApp"), (crd.machine_type(), "MachineType")):
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
        known = frozenset({"status.conditions"} if kind == "MachineType" else ())  # described once
        parts.append("\n".join(_sections("status", schema, f"Fields of a {kind}'s status", known)))
    return "\n".join(parts)


def _in(reason: str) -> str:
    return ", ".join(f"`{each}`" for each in places(reason))


def _lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _sections(
    place: str, schema: Mapping[str, Any], title: str = "", known: frozenset[str] = frozenset()
) -> Iterator[str]:
    """A section for an object, then one for each object inside it that is not in ``known``."""
    inner: list[tuple[str, Mapping[str, Any]]] = []
    yield f"## {title or place}\n"
    yield "| field | type | default | |\n|---|---|---|---|"
    for name, value in schema["properties"].items():
        kind = _type(value)
        path = f"{place}.{name}"
        if nested := _object_in(value):
            inner.append((path, nested))
            kind = f"[{kind}](#{_anchor(path)})"
        default = f" `{_scalar(value['default'])}`" if "default" in value else ""
        required = "**required**; " if name in schema.get("required", ()) else ""
        yield f"| `{name}` | {kind} |{default} | {required}{_prose(value.get('description', ''))} |"
    yield ""
    if rules := schema.get("x-kubernetes-validations"):
        yield "Rules:\n\n" + _lines(f"- {_prose(rule['message'])}" for rule in rules)
    for path, nested in inner:
        if path not in known:
            yield from _sections(path, nested)


def _object_in(schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object whose fields have a section: the value itself, or what a list holds."""
    inside = schema.get("items") or schema
    return inside if inside.get("properties") else None


def _type(schema: Mapping[str, Any]) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema["type"]:
        case "array":
            return f"list of {_type(schema['items'])}{_range(schema, 'minItems', 'maxItems')}"
        case "object" if "additionalProperties" in schema:
            return f"map to {_type(schema['additionalProperties'])}"
        case "object" if "properties" not in schema:
            return "object, free form"
        case "string":
            return ("time" if schema.get("format") == "date-time" else "string") + _range(
                schema, "minLength", "maxLength"
            )
        case other:
            return f"{other}{_range(schema, 'minimum', 'maximum')}"


def _range(schema: Mapping[str, Any], least: str, most: str) -> str:
    low, high = schema.get(least), schema.get(most)
    if most == "maximum":
        high = None if high == 1_000_000_000 else high  # a bound that only keeps it within 32 bits
        return f", {low} to {high}" if high is not None else (f", from {low}" if low is not None else "")
    return f", at most {high}" if high is not None else ""


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _anchor(path: str) -> str:
    return path.replace(".", "").lower()


def _prose(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; 1 when they are not what the models say."""
    parser = argparse.ArgumentParser(
        prog="python -m drumline_operator.reference", description="pages of docs/reference"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the pages")
    what.add_argument("--check", action="store_true", help="exit 1 when a page is not up to date")
    parser.add_argument("--folder", type=Path, default=Path("docs/reference"), help="where (default: docs/reference)")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in pages().items():
        path: Path = options.folder / name
        if options.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what the models say; run `make reference`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
