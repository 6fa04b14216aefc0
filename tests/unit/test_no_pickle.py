"""Nothing in the package turns bytes from outside into code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import drumline

PACKAGE = Path(drumline.__file__).parent
#: What turns bytes into code.
FORBIDDEN_MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
#: These of torch.distributed pickle, too.
FORBIDDEN_METHODS = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip


def sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "testing" not in path.relative_to(PACKAGE).parts]


def findings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
                yield name
            for keyword in node.keywords:
                unsafe = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg == "allow_pickle" and unsafe:
                    yield "allow_pickle"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "torch.load(f)", "eval(text)",
        "dist.all_gather_object(a, b)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert list(findings(ast.parse(source)))
    assert not list(findings(ast.parse("np.load(f, allow_pickle=False); json.loads(x); model.eval()")))


def test_nothing_reads_pickles_or_runs_text() -> None:
    assert len(sources()) > 50
    found = {path.name: list(findings(ast.parse(path.read_text()))) for path in sources()}
    assert {name: what for name, what in found.items() if what} == {}
