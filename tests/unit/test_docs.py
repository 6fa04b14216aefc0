"""The documentation names what exists, and everything that exists is documented."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import typer
import yaml
from pydantic import BaseModel

import drumline
from drumline import (
    App,
    DistributedRunner,
    DistributedWorker,
    contract,
    diffusion,
    errors,
    nursery_protocol,
    problems,
    protocol,
    toolkit,
    training,
)
from drumline.cli import app as command_line
from drumline.diffusion.plan import ModelShape, ParallelPlan
from drumline.server.metrics import Metrics
from drumline_operator.metrics import Metrics as OperatorMetrics
from drumline_operator.settings import ENV_PREFIX as OPERATOR_PREFIX
from drumline_operator.settings import OperatorSettings, ProcessSettings

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
MAKEFILE = (ROOT / "Makefile").read_text()
#: Only folders of ours are entered: others (a cluster that runs, an environment) change while we look.
FOLDERS = [path for path in sorted(ROOT.iterdir()) if path.is_dir() and path.name[0] != "." and path.name != "build"]
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@page
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} does not exist"
        assert linked.is_relative_to(ROOT), f"{target} is outside the project"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@page
def test_tests_that_are_named_exist(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text()):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


@page
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    commands = re.findall(r"(?:^|`|&& )make ([a-z][a-z -]*[a-z])", path.read_text(), re.MULTILINE)
    named = {word for command in commands for word in command.split()}
    assert named <= targets


@page
def test_code_blocks_are_well_formed(path: Path) -> None:
    for code in blocks(path, "python"):
        ast.parse(code)
    for document in blocks(path, "yaml"):
        list(yaml.safe_load_all(document))
    for text in blocks(path, "json"):
        json.loads(text)


def test_the_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {"make demo", "make test"} <= set(re.findall(r"make [a-z-]+", readme))


def test_every_target_is_explained() -> None:
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z-]+)", shown)) == set(targets)


# -- reference


def setting_rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
        if isinstance(default, BaseModel):
            default = default.model_dump(exclude_defaults=True)
        shown = default if isinstance(default, str) else json.dumps(default)
        rows.append(
            f"| `{prefix}{name.upper() if prefix else name}` | {f'`{shown}`' if shown else ''} | {field.description} |"
        )
    return rows


@pytest.mark.parametrize(
    ("model", "prefix", "page"),
    [
        (contract.RunnerSettings, contract.ENV_PREFIX, "reference/settings.md"),
        (contract.RestartSettings, "", "reference/settings.md"),
        (OperatorSettings, OPERATOR_PREFIX, "architecture/operator.md"),
        (ProcessSettings, OPERATOR_PREFIX, "architecture/operator.md"),
    ],
)
def test_settings_are_documented(model: type[BaseModel], prefix: str, page: str) -> None:
    text = (REFERENCE.parent / page).read_text()
    missing = [row for row in setting_rows(model, prefix) if row not in text]
    assert not missing, f"add to docs/{page}:\n" + "\n".join(missing)


def test_no_setting_is_documented_that_does_not_exist() -> None:
    named = set(re.findall(r"DRUMLINE_[A-Z_]+[A-Z]", "".join(path.read_text() for path in PAGES)))
    ours = {contract.ENV_PREFIX + name.upper() for name in contract.RunnerSettings.model_fields}
    fields = [*OperatorSettings.model_fields, *ProcessSettings.model_fields]
    mistakes = {"DRUMLINE_PROT"}  # which troubleshooting shows
    assert named <= ours | mistakes | {OPERATOR_PREFIX + name.upper() for name in fields}


def test_errors_are_documented() -> None:
    text = (REFERENCE / "errors.md").read_text()
    public = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.DrumlineError) and not name.startswith("_")
    ]
    assert [name for name in public if f"| `{name}` |" not in text] == []


def test_problem_types_are_documented() -> None:
    text = (REFERENCE / "errors.md").read_text()
    missing = [
        f"{status} `{suffix}`"
        for suffix, (status, _) in problems.CATALOGUE.items()
        if not re.search(rf"^\| {status} \| `{suffix}` \|", text, re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.parametrize("vocabulary", [protocol, nursery_protocol], ids=lambda module: module.__name__)
def test_messages_are_documented(vocabulary: ModuleType) -> None:
    text = (ROOT / "docs" / "architecture" / "worker.md").read_text()
    tagged = [
        name
        for name, value in vars(vocabulary).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__struct_config__.tag is not None
    ]
    assert [name for name in tagged if f"| `{name}` |" not in text] == []


def test_metrics_are_documented() -> None:
    text = (REFERENCE / "metrics.md").read_text()
    known = {
        family.name + ("_total" if family.type == "counter" else "") for family in Metrics(list).registry.collect()
    }
    operators = OperatorMetrics(int, tuple, dict).registry.collect()
    known |= {
        family.name + ("_total" if family.type == "counter" else "")
        for family in operators
        if family.name.startswith("drumline_")
    }
    assert len(known) > 10
    assert set(re.findall(r"^\| `(drumline_\w+)", text, re.MULTILINE)) == known


def test_reserved_routes_are_documented() -> None:
    text = (REFERENCE / "http.md").read_text()
    assert [path for path in contract.RESERVED_PATHS if f"{path}" not in text] == []


def test_public_names_are_documented() -> None:
    words = set(re.findall(r"\w+", (REFERENCE / "python.md").read_text() + (REFERENCE / "errors.md").read_text()))
    names = {*drumline.__all__, *toolkit.__all__} - {"__version__"}
    for public in (DistributedRunner, DistributedWorker, App):
        names |= {name for name in vars(public) if not name.startswith("_") and callable(getattr(public, name))}
    names |= set(inspect.signature(DistributedRunner).parameters)
    assert sorted(names - words) == []


def test_pieces_for_diffusion_are_documented() -> None:
    words = set(re.findall(r"\w+", (REFERENCE / "diffusion.md").read_text()))
    names = {*diffusion.__all__, *ModelShape.__dataclass_fields__, *ParallelPlan.__dataclass_fields__}
    names |= {name for name in vars(ParallelPlan) if not name.startswith("_")}
    assert sorted(names - words) == []


def test_pieces_for_training_are_documented() -> None:
    words = set(re.findall(r"\w+", (REFERENCE / "training.md").read_text()))
    assert sorted({*training.__all__} - words) == []


def test_commands_and_options_are_documented() -> None:
    sections = dict(
        re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (REFERENCE / "cli.md").read_text(), re.MULTILINE | re.DOTALL)
    )
    commands = typer.main.get_command(command_line).commands  # type: ignore[attr-defined]
    assert set(sections) == set(commands)
    sections["stream"] += sections["invoke"]  # which it refers to
    for name, command in commands.items():
        shown = [o for p in command.params if not getattr(p, "hidden", False) for o in p.opts if o.startswith("-")]
        assert [option for option in shown if f"`{option}" not in sections[name] and option != "--debug"] == []
