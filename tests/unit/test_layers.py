"""Rules about imports and files that import-linter cannot express; the others are contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "worker" / "drumline"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def uses_torch_distributed(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(f"{n.name}.".startswith("torch.distributed.") for n in names):
                return True
            case ast.ImportFrom(module=str(module)) if f"{module}.".startswith("torch.distributed."):
                return True
            case ast.ImportFrom(module="torch", names=names) if any(n.name == "distributed" for n in names):
                return True
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                return True
    return False


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "def f():\n    from torch.distributed.device_mesh import DeviceMesh",
        "from torch import distributed",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source: str) -> None:
    assert uses_torch_distributed(ast.parse(source))
    assert not uses_torch_distributed(ast.parse(source.replace("distributed", "nn")))


#: Workers, and pieces that workers call: users' code, to which the default process group belongs.
USERS = ("drumline.testing", "drumline.diffusion", "drumline.training")


def test_only_the_rank_group_uses_torch_distributed() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if not name.startswith(USERS) and uses_torch_distributed(ast.parse(path.read_text()))
    }
    assert users == {"drumline.rank.group"}


def test_source_roots_and_test_folders_are_no_packages() -> None:
    # A package named `operator` would shadow the standard library's.
    wrong = [
        *(path for root in ("operator", "worker") for path in ROOT.glob(f"{root}/__init__.py")),
        *(ROOT / "tests").rglob("__init__.py"),
    ]
    assert wrong == []


def test_modules_stay_short() -> None:
    folders = ("bench", "e2e", "examples", "operator")
    sources = [*MODULES.values(), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("drumline", {"torch", "numpy", "PIL", "fastapi", "starlette", "uvicorn", "zmq", "rich", "typer", "asyncio"}),
        ("drumline.distributed", {"torch", "numpy", "PIL", "fastapi", "zmq"}),
        ("drumline.training", {"torch", "numpy", "transformers"}),
        ("drumline.training.stage_plan", {"torch", "numpy", "transformers"}),
        ("drumline.planning.workload", {"torch", "numpy", "transformers", "diffusers"}),
        ("drumline.api.v1alpha1", {"torch", "numpy", "PIL", "fastapi", "zmq"}),
        # The process that serves HTTP and owns the ranks: it never loads torch, so it can never touch a GPU.
        ("drumline.server.app", {"torch"}),
        ("drumline.runner.runner", {"torch", "fastapi", "zmq"}),
        ("drumline.cli", {"torch", "fastapi", "zmq"}),
        # What comes before the start of the process that imports torch: pydantic alone would take longer than all of it.
        ("drumline.early", {"torch", "fastapi", "pydantic", "yaml", "asyncio"}),
        ("drumline.diffusion.plan", {"torch", "numpy", "PIL", "diffusers", "asyncio"}),
        ("drumline.diffusion", {"torch", "numpy", "PIL", "diffusers"}),
        ("drumline_operator.reconcile", {"torch", "numpy", "fastapi", "zmq", "kopf", "kubernetes"}),
    ],
)
def test_imports_are_light(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unwanted & set(done.stdout.split()) == set()
