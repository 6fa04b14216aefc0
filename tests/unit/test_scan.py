"""Which class is an App and which a worker, told from the source alone."""

import pytest

from drumline import scan
from drumline.errors import ConfigurationError

APP = "import drumline\nclass A(drumline.App): pass\n"
WORKER = "from drumline.distributed import DistributedWorker\nclass W(DistributedWorker): pass\n"


@pytest.fixture
def kind(tmp_path):
    def look(source, name=""):
        file = tmp_path / "code.py"
        file.write_text(source)
        return scan.kind_of(f"{file}:{name}" if name else str(file))

    return look


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (APP, "app"),
        (WORKER, "worker"),
        (APP + WORKER, "app"),
        ("import drumline as fal\nclass A(fal.App, num_gpus=2): pass\n", "app"),
        ("from drumline import App as Base\nclass A(Base): pass\n", "app"),
        ("from drumline import *\nclass A(App): pass\n", "app"),
        ("from drumline.app import App\nclass A(App): pass\n", "app"),
        ("import drumline.app\nclass A(drumline.app.App): pass\n", "app"),
        ("import drumline.distributed as d\nclass W(d.DistributedWorker): pass\n", "worker"),
        ("import drumline\nclass W(drumline.distributed.DistributedWorker): pass\n", "worker"),
        ("from drumline.worker import DistributedWorker as W0\nclass W(W0): pass\n", "worker"),
        ("import drumline\nBase = drumline.DistributedWorker\nclass W(Base): pass\n", "worker"),
        (WORKER + "class Child(W): pass\n", "worker"),
        (WORKER + "class Req(BaseModel): pass\nclass Net(nn.Module): pass\n", "worker"),
        (
            "try:\n    import drumline\nexcept ImportError:\n    raise\nif True:\n    class A(drumline.App): pass\n",
            "app",
        ),
        ("import torch\n" + APP, "app"),
        ("from drumline import App\nfrom typing import Generic\nclass A(Generic[int], App): pass\n", "app"),
        ("from base import Mine\nclass A(Mine): pass\n", None),
        ("class A: pass\n", None),
        ("App = object\nclass A(App): pass\n", None),
        ("def make():\n    import drumline\n    class A(drumline.App): pass\n", None),
        ("", None),
    ],
)
def test_the_kind_of_a_file(source, expected, kind):
    assert kind(source) == expected


@pytest.mark.parametrize(("name", "expected"), [("A", "app"), ("W", "worker"), ("Outer.W", "worker"), ("Nobody", None)])
def test_the_kind_of_a_named_class(name, expected, kind):
    nested = "class Outer:\n    class W(DistributedWorker): pass\n"
    assert kind(APP + WORKER + nested, name) == expected


def test_a_name_that_is_defined_later_counts(kind):
    assert kind("import drumline\nclass A: pass\nclass A(drumline.App): pass\n", "A") == "app"


def test_nothing_is_imported(kind, tmp_path):
    assert kind(f"open({str(tmp_path / 'touched')!r}, 'w')\n" + WORKER) == "worker"
    assert not (tmp_path / "touched").exists()


def test_a_module_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner.py").write_text(WORKER)
    assert scan.kind_of(f"{tmp_path}/package.inner:W") == "worker"
    monkeypatch.syspath_prepend(tmp_path)
    assert scan.kind_of("package.inner:W") == "worker"
    assert scan.kind_of("package:W") is None
    assert scan.kind_of("package.absent:W") is None


def test_a_syntax_error_names_file_and_line(kind, tmp_path):
    with pytest.raises(ConfigurationError, match=r"code\.py:2: .*: def broken\("):
        kind("x = 1\ndef broken(\n")


def test_a_file_that_is_not_text(kind, tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    with pytest.raises(ConfigurationError, match="binary"):
        scan.kind_of(str(tmp_path / "binary.py"))
