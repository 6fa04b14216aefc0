"""What the documentation shows of Kubernetes is right: manifests, commands, options, conditions, fields."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from drumline.api.status import APP_CONDITIONS
from drumline.api.v1alpha1 import GROUP, DistributedApp, MachineType
from drumline.cli import app as command_line
from drumline_operator.crd import distributed_app, machine_type
from drumline_operator.plan import validated
from drumline_operator.settings import OperatorSettings

ROOT = Path(__file__).parents[2]
#: Only folders of ours are entered: others (a cluster that runs, an environment) change while we look.
FOLDERS = [path for path in sorted(ROOT.iterdir()) if path.is_dir() and path.name[0] != "." and path.name != "build"]
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
KINDS = {"distributedapps", "distributedapp", "dapp", "machinetypes", "machinetype", "mt"}
VERBS = {
    *("annotate", "apply", "auth", "config", "cordon", "create", "debug", "delete", "describe", "drain", "edit"),
    *("events", "exec", "explain", "get", "label", "logs", "patch", "port-forward", "rollout", "run", "scale"),
    *("top", "uncordon", "version", "wait", "cluster-info", "cp", "api-resources", "replace", "set", "taint"),
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command in blocks of shell."""
    for text in blocks(path, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;(?= )|(?<= )\|(?= )", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


@page
def test_manifests_are_valid(path: Path) -> None:
    settings = OperatorSettings(worker_image="worker:1")
    for text in blocks(path, "yaml"):
        for document in yaml.safe_load_all(text):
            if not isinstance(document, dict) or "apiVersion" not in document:
                continue
            assert {"kind", "metadata"} <= document.keys()
            if str(document["apiVersion"]).startswith(GROUP):
                model = {"DistributedApp": DistributedApp, "MachineType": MachineType}[document["kind"]]
                model.model_validate(document, by_name=False)
                if model is DistributedApp:
                    validated(document, settings)


@page
def test_commands_of_drumline_exist(path: Path) -> None:
    known: Mapping[str, Any] = typer.main.get_command(command_line).commands  # type: ignore[attr-defined]
    for words in commands(path):
        if words[0] != "drumline" or len(words) < 2 or words[1].startswith("-"):
            continue
        assert words[1] in known, f"{' '.join(words)}: no such command"
        options = {each for parameter in known[words[1]].params for each in parameter.opts} | {"--help", "-h"}
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert given <= options, f"{' '.join(words)}: no such option"


@page
def test_modules_exist(path: Path) -> None:
    for words in commands(path):
        if words[0].endswith("python") and "-m" in words:
            module = words[words.index("-m") + 1]
            # Programs of the project itself are packages in its root.
            assert (ROOT / module.replace(".", "/")).exists() or importlib.util.find_spec(module), (
                f"{module}: no such module"
            )


@page
def test_commands_of_kubectl_make_sense(path: Path) -> None:
    for words in commands(path):
        if words[0] != "kubectl":
            continue
        line = " ".join(words)
        verb = next((word for word in words[1:] if not word.startswith("-")), "")
        assert verb in VERBS, f"{line}: no such verb"
        for condition in re.findall(r"--for=condition=(\w+) (?:dapp|distributedapp)", line):
            assert condition in APP_CONDITIONS, f"{line}: no such condition"
        for kind in re.findall(r"\b(distributedapps?|machinetypes?)\b", line):
            assert kind in KINDS
        if verb == "explain":
            assert field(words[words.index("explain") + 1]), f"{line}: no such field"


def test_fields_that_prose_explains_exist() -> None:
    named = {each for path in PAGES for each in re.findall(r"kubectl explain ([\w.]+)", path.read_text())}
    assert named
    assert [each for each in named if not field(each)] == []


def field(place: str) -> bool:
    """Whether a custom resource has such a field: ``dapp.spec.serving``."""
    kind, *parts = place.split(".")
    definition = {"dapp": distributed_app, "mt": machine_type}.get(kind)
    if definition is None:
        return False
    schema = definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in parts:
        schema = (schema.get("items") or schema).get("properties", {}).get(part)
        if schema is None:
            return False
    return True


def test_jsonpaths_name_fields_of_the_status() -> None:
    paths = re.findall(r"kubectl get dapp [^\n]*jsonpath='\{\.([\w.]+)\}'", "".join(path.read_text() for path in PAGES))
    assert paths
    assert [each for each in paths if not field(f"dapp.{each}")] == []
