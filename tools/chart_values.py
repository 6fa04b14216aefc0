"""What the chart's schema says, for people: `charts/drumline/values.yaml` and `docs/reference/chart.md`.

`python tools/chart_values.py --write` writes both from `values.schema.json`, `--check` fails when one is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "drumline"
PAGE = ROOT / "docs" / "reference" / "chart.md"
WIDTH = 120
#: Helm's own: it takes no part in `values.yaml`.
HIDDEN = {"global"}
INTRODUCTION = """\
# Values of the Helm chart

Made by `make reference` from `charts/drumline/values.schema.json`; do not edit.
[Installing](../guide/installing.md) says how to use them. Helm refuses values that are not here, and says which.
"""
Schema = Mapping[str, Any]


def load() -> Schema:
    """Return the schema of the chart's values."""
    schema: Schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return schema


def resolved(node: Schema, root: Schema) -> Schema:
    """Return `node` with what its reference says; what it says itself wins."""
    result = dict(node)
    for part in (*node.get("allOf", ()), *([node] if "$ref" in node else ())):
        if "$ref" in part:
            result = {**resolved(root["definitions"][part["$ref"].rpartition("/")[2]], root), **result}
    return result


def defaults(root: Schema) -> dict[str, Any]:
    """Return the values that hold when nobody sets any."""
    return {key: default for key, default, _ in _entries(root, root) if key not in HIDDEN}


def _entries(node: Schema, root: Schema) -> Iterator[tuple[str, Any, Schema]]:
    """Name, default and schema of each property of an object."""
    own = node.get("default", {})
    for key, part in node["properties"].items():
        child = resolved(part, root)
        if key in own:
            child = {**child, "default": own[key]}
        if "properties" in child:
            yield key, {name: default for name, default, _ in _entries(child, root)}, child
        elif "default" in child:
            yield key, child["default"], child
        else:
            raise KeyError(f"{key} has no default in values.schema.json; give it one")


def values(root: Schema) -> str:
    """Return `values.yaml`: every value at its default, with what it means."""
    lines = ["# Made by `make reference` from values.schema.json; do not edit."]
    for key, _, child in _entries(root, root):
        if key not in HIDDEN:
            lines += ["", *_block(key, child, root, "")]
    return "\n".join(lines) + "\n"


def _block(key: str, node: Schema, root: Schema, indent: str) -> list[str]:
    words = textwrap.wrap(node["description"], WIDTH - len(indent) - 2)
    lines = [f"{indent}# {line}" for line in words]
    if "properties" not in node:
        text = yaml.safe_dump({key: node["default"]}, sort_keys=False, width=WIDTH, allow_unicode=True)
        return [*lines, *(f"{indent}{line}" for line in text.splitlines())]
    lines.append(f"{indent}{key}:")
    for name, _, child in _entries(node, root):
        lines += _block(name, child, root, indent + "  ")
    return lines


def page(root: Schema) -> str:
    """Return the reference page: a table for each group of values."""
    single = [entry for entry in _entries(root, root) if not _has_parts(entry[2], root)]
    parts = [INTRODUCTION, _table([row for key, _, child in single for row in _rows(key, child, root)])]
    for key, _, child in _entries(root, root):
        if _has_parts(child, root):
            rows = [row for row in _rows(key, child, root) if row[0] != key]
            whole = "properties" not in child and child["default"]
            own = f"Default:\n\n```yaml\n{_yaml(key, child['default'])}```\n" if whole else ""
            parts += [f"## {key}\n\n{child['description']}\n", _table(rows), *([own] if own else [])]
    return "\n".join(parts)


def _yaml(key: str, default: Any) -> str:
    return yaml.safe_dump({key: default}, sort_keys=False, width=WIDTH, default_flow_style=None)


def _has_parts(node: Schema, root: Schema) -> bool:
    return any(path for path, _, _ in _rows("", node, root))


def _rows(path: str, node: Schema, root: Schema) -> Iterator[tuple[str, str, str]]:
    """Path, default and meaning of a value and all that is in it."""
    if "properties" not in node:
        yield path, _shown(node), node["description"]
    items = resolved(node.get("items", {}), root)
    named = node.get("additionalProperties")
    inner, prefix = node, path
    if "properties" in items:
        inner, prefix = items, f"{path}[]"
    elif isinstance(named, dict) and "properties" in (of_each := resolved(named, root)):
        inner, prefix = of_each, f"{path}.NAME"
    own = node.get("default", {}) if "properties" in node else {}
    for key, part in inner.get("properties", {}).items():
        child = resolved(part, root)
        if key in own:
            child = {**child, "default": own[key]}
        yield from _rows(f"{prefix}.{key}", child, root)


def _shown(node: Schema) -> str:
    default = node.get("default")
    simple = default not in (None, "", [], {}) and len(json.dumps(default)) < 80
    return f"`{default if isinstance(default, str) else json.dumps(default)}`" if simple else ""


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = ["| value | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{path}` | {default} | {words} |" for path, default, words in rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 1 when a file is not what the schema says."""
    parser = argparse.ArgumentParser(prog="python tools/chart_values.py", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the files")
    what.add_argument("--check", action="store_true", help="exit 1 when a file is not up to date")
    options = parser.parse_args(arguments)
    root = load()
    stale = []
    for path, text in {CHART / "values.yaml": values(root), PAGE: page(root)}.items():
        if options.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what values.schema.json says; run `make reference`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
