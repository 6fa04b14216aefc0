"""The FLUX examples are copies of each other on purpose (examples/README.md): where they need not differ they must not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAME_REQUEST = ("flux_ring", "flux_usp", "flux_tensor", "flux_pipefusion")
SAME_CALL = ("flux_ring", "flux_usp")


def call(example: str) -> ast.FunctionDef:
    """The worker's `__call__`."""
    tree = ast.parse((EXAMPLES / example / "app.py").read_text())
    [worker] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    [found] = [node for node in worker.body if isinstance(node, ast.FunctionDef) and node.name == "__call__"]
    return found


@pytest.mark.parametrize("example", SAME_REQUEST)
def test_requests_of_the_flux_examples_are_the_same(example: str) -> None:
    first, other = call("flux_ulysses"), call(example)
    assert ast.unparse(other.args) == ast.unparse(first.args)
    assert ast.get_docstring(other) == ast.get_docstring(first)


@pytest.mark.parametrize("example", SAME_CALL)
def test_what_splits_the_tokens_is_chosen_in_setup_alone(example: str) -> None:
    assert ast.unparse(call(example)) == ast.unparse(call("flux_ulysses"))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/app.py")), ids=lambda file: file.parent.name)
def test_an_example_has_its_four_files_and_a_page_of_one_screen(file: Path) -> None:
    page = (file.parent / "README.md").read_text()
    assert len(page.splitlines()) <= 40
    [picture] = re.findall(r"!\[[^]]+\]\(([\w.]+)\)", page)
    assert (file.parent / picture).stat().st_size > 1000
    assert f"drumline run examples/{file.parent.name}/app.yaml" in page
    assert (file.parent / "app.yaml").is_file()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/app.py")), ids=lambda file: file.parent.name)
def test_an_example_can_be_copied_alone(file: Path) -> None:
    """It imports nothing that lies beside its folder, or that an installed drumline lacks."""
    neighbours = {path.stem for path in [*EXAMPLES.iterdir(), *file.parent.glob("*.py")]}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & neighbours
