"""TARGETs, files as modules, and class references that mean the same in another process."""

import pickle
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from drumline import targets
from drumline.errors import ConfigurationError
from drumline.worker import DistributedWorker

WORKER = "from drumline.worker import DistributedWorker\n"


class ModuleLevel(DistributedWorker):
    """Found again from outside."""

    class Nested(DistributedWorker):
        """Also."""


@pytest.fixture(autouse=True)
def _clean_imports():
    """Tests put folders on the path and modules into the process; both go again."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("drumline"):
            del sys.modules[name]


def write(folder: Path, text: str, name: str | None = None) -> Path:
    path = folder / (name or f"w{uuid.uuid4().hex[:8]}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# --- TARGET


@pytest.mark.parametrize(
    ("text", "kind", "reference"),
    [
        ("app.py", "file", "{}/app.py"),
        ("./app.py", "file", "{}/app.py"),
        ("{}/app.py", "file", "{}/app.py"),
        ("app.py:Sdxl", "file", "{}/app.py:Sdxl"),
        ("app.py::Sdxl", "file", "{}/app.py:Sdxl"),
        ("app:Sdxl", "module", "{}/app:Sdxl"),
        ("package.app:Outer.Sdxl", "module", "{}/package.app:Outer.Sdxl"),
        ("package/app:Sdxl", "module", "{}/package/app:Sdxl"),
    ],
)
def test_forms_of_a_target(tmp_path, text, kind, reference):
    tmp_path = tmp_path.resolve()
    write(tmp_path, "", "app.py")
    target = targets.parse(text.format(tmp_path), folder=tmp_path)
    assert (target.kind, target.reference, target.title) == (kind, reference.format(tmp_path), "app")


@pytest.mark.parametrize(
    "text", ["", ":", "app", ":Class", "app:", "app:9", "a b:C", "app.py:", "app.yaml:C", "app-x:C"]
)
def test_what_is_no_target(tmp_path, text):
    with pytest.raises(ConfigurationError):
        targets.parse(text, folder=tmp_path)


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, "", "parallel_sdxl.py")
    with pytest.raises(ConfigurationError, match=r"no such file; did you mean 'parallel_sdxl\.py'\?"):
        targets.parse("paralel_sdxl.py", folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"the folder .*/nowhere does not exist"):
        targets.parse("nowhere/app.py:C", folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"did you mean .*/parallel_sdxl\.py\?"):
        targets.parse("parallel_sdxl", folder=tmp_path)
    write(tmp_path, "", "example/app.yaml")
    with pytest.raises(ConfigurationError, match=r"did you mean .*/example/app\.yaml\?"):
        targets.parse("example", folder=tmp_path)


def test_the_plan_of_a_file(tmp_path):
    path = write(tmp_path, "", "Parallel_SDXL.v2.py")
    plan = targets.launch_plan(str(path), world_size=2, port=None)
    assert (plan.settings.target, plan.settings.name, plan.settings.world_size) == (str(path), "parallel-sdxl-v2", 2)
    assert plan.settings.port == 8080
    assert (plan.env, plan.notes) == ({}, ())


def test_the_plan_of_a_manifest(tmp_path):
    write(tmp_path, WORKER + "class W(DistributedWorker): ...\n", "manifested.py")
    path = write(
        tmp_path,
        """
        apiVersion: drumline.dev/v1alpha1
        kind: DistributedApp
        metadata: {name: demo}
        spec:
          workerClass: manifested:W
          numGPUs: 2
          env: [{name: A, value: b}]
          setupArgs: {n: 1}
        """,
        "app.yaml",
    )
    plan = targets.launch_plan(str(path), world_size=3, setup_args={"n": 2})
    assert (plan.settings.name, plan.settings.world_size, plan.settings.setup_args) == ("demo", 3, {"n": 2})
    assert plan.env == {"A": "b"}
    assert len(plan.notes) == 1
    assert targets.resolve(plan.settings.target).__name__ == "W"


def test_a_wrong_override(tmp_path):
    with pytest.raises(ConfigurationError, match="DRUMLINE_PORT"):
        targets.launch_plan(str(write(tmp_path, "")), port=70000)


# --- files as modules


def test_a_file_is_imported_once_under_its_own_name(tmp_path):
    path = write(
        tmp_path,
        """
        from __future__ import annotations
        import dataclasses, pickle
        import pydantic
        if __name__ == "__main__":
            raise SystemExit("ran as a script")
        @dataclasses.dataclass
        class Point:
            x: int
        class Model(pydantic.BaseModel):
            point: Point
        """,
    )
    module = targets.load_file(path)
    assert module.__name__ == path.stem
    assert targets.load_file(str(path)) is module
    point = module.Point(1)
    assert pickle.loads(pickle.dumps(point)) == point
    assert module.Model.model_validate({"point": {"x": "2"}}).point.x == 2


def test_a_file_sees_its_neighbours_and_they_see_it(tmp_path):
    helper, name = f"h{uuid.uuid4().hex[:8]}", f"w{uuid.uuid4().hex[:8]}"
    write(tmp_path, f"import {name}\nVALUE = 3\n", f"{helper}.py")
    path = write(tmp_path, f"LATER = 4\nfrom {helper} import VALUE, {name} as me\n", f"{name}.py")
    module = targets.load_file(path)
    assert module.VALUE == 3
    assert module.me is module


@pytest.mark.parametrize("stem", ["json", "pytest", "queue", "a-b", "class"])
def test_a_name_that_belongs_to_somebody_else(tmp_path, stem):
    path = write(tmp_path, "MINE = True\n", f"{stem}.py")
    module = targets.load_file(path)
    assert module.MINE
    assert module.__name__ != stem
    assert not hasattr(sys.modules.get(stem), "MINE")
    code = f"from drumline import targets; print(targets.load_file({str(path)!r}).__name__)"
    assert python("-c", code).strip() == module.__name__


def test_a_folder_that_is_on_the_path_by_another_name(tmp_path):
    path = write(tmp_path, "", f"real/w{uuid.uuid4().hex[:8]}.py")
    (tmp_path / "link").symlink_to(path.parent)
    sys.path.insert(0, str(tmp_path / "link"))
    assert targets.load_file(tmp_path / "link" / path.name).__name__ == path.stem


def test_two_files_of_one_name(tmp_path):
    one = targets.load_file(write(tmp_path, "N = 1\n", "one/samename.py"))
    two = targets.load_file(write(tmp_path, "N = 2\n", "two/samename.py"))
    assert (one.N, two.N) == (1, 2)
    assert one.__name__ != two.__name__


def test_a_file_of_a_package_may_import_relatively(tmp_path):
    package = f"p{uuid.uuid4().hex[:8]}"
    write(tmp_path, "", f"{package}/__init__.py")
    write(tmp_path, "VALUE = 5\n", f"{package}/helper.py")
    path = write(tmp_path, WORKER + "from .helper import VALUE\nclass W(DistributedWorker): ...\n", f"{package}/app.py")
    cls = targets.resolve(str(path))
    assert cls.__module__ == f"{package}.app"
    assert targets.resolve(targets.class_reference(cls)) is cls


def test_a_syntax_error_shows_the_line(tmp_path):
    path = write(tmp_path, "x = 1\ndef broken(:\n    pass\n")
    with pytest.raises(ConfigurationError) as caught:
        targets.load_file(path)
    assert f'File "{path}", line 2' in str(caught.value)
    assert "def broken(:" in str(caught.value)
    assert path.stem not in sys.modules


def test_an_error_while_importing_keeps_the_users_traceback(tmp_path):
    path = write(tmp_path, "def inner():\n    return 1 / 0\n\ninner()\n")
    with pytest.raises(ConfigurationError) as caught:
        targets.load_file(path)
    text = str(caught.value)
    assert f"cannot import {path}: ZeroDivisionError: division by zero" in text
    assert "in inner" in text
    assert "targets.py" not in text
    assert "importlib" not in text
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert path.stem not in sys.modules


def test_a_missing_dependency_is_not_a_missing_target(tmp_path):
    name = f"w{uuid.uuid4().hex[:8]}"
    write(tmp_path, "import surely_not_installed\n", f"{name}.py")
    for reference in (f"{tmp_path}/{name}.py:W", f"{tmp_path}/{name}:W"):
        with pytest.raises(ConfigurationError, match="No module named 'surely_not_installed'") as caught:
            targets.resolve(reference)
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_file_that_exits(tmp_path):
    with pytest.raises(ConfigurationError, match="it called exit"):
        targets.load_file(write(tmp_path, "import sys\nsys.exit(3)\n"))


# --- classes


def test_the_only_app_goes_before_workers(tmp_path):
    path = write(
        tmp_path,
        WORKER + "from drumline.app import App\nclass W(DistributedWorker): ...\nclass V(DistributedWorker): ...\n"
        "class A(App): ...\nAlias = A\n",
    )
    assert targets.resolve(str(path)).__name__ == "A"
    assert targets.resolve(f"{path}:V").__name__ == "V"
    assert targets.resolve(f"{path}:Alias").__name__ == "A"


def test_the_only_worker_without_the_imported_ones(tmp_path):
    base = f"b{uuid.uuid4().hex[:8]}"
    write(tmp_path, WORKER + "class Base(DistributedWorker): ...\n", f"{base}.py")
    path = write(tmp_path, f"from {base} import Base\nclass W(Base): ...\nclass Other: ...\n")
    assert targets.resolve(str(path)).__name__ == "W"


def test_several_and_none(tmp_path):
    path = write(tmp_path, WORKER + "class W(DistributedWorker): ...\nclass V(DistributedWorker): ...\n")
    with pytest.raises(ConfigurationError, match=rf"several worker classes: V, W; name one: {path}:V"):
        targets.resolve(str(path))
    with pytest.raises(ConfigurationError, match="neither an App nor a DistributedWorker"):
        targets.resolve(str(write(tmp_path, "class X: ...\n")))


def test_a_class_that_is_missing_or_no_worker(tmp_path):
    path = write(tmp_path, WORKER + "class SdxlWorker(DistributedWorker): ...\nclass Plain: ...\nname = 3\n")
    with pytest.raises(ConfigurationError, match=r"has no class 'SdxlWorkr'; did you mean 'SdxlWorker'\?"):
        targets.resolve(f"{path}:SdxlWorkr")
    with pytest.raises(ConfigurationError, match=r"has no class 'Zebra'; it has DistributedWorker, Plain, SdxlWorker"):
        targets.resolve(f"{path}:Zebra")
    for name in ("Plain", "name"):
        with pytest.raises(ConfigurationError, match=f"{name} is not a subclass of drumline.App"):
            targets.resolve(f"{path}:{name}")


def test_a_module_that_is_missing(tmp_path):
    with pytest.raises(ConfigurationError, match="no module named 'surely_not_installed'"):
        targets.resolve("surely_not_installed.sub:W")
    with pytest.raises(ConfigurationError, match=r"no module named 'drumline\.nothing'"):
        targets.resolve("drumline.nothing:W")


# --- references


@pytest.mark.parametrize("cls", [ModuleLevel, ModuleLevel.Nested])
def test_a_reference_names_the_same_class_again(cls):
    assert targets.resolve(targets.class_reference(cls)).__qualname__ == cls.__qualname__


def test_a_reference_to_an_installed_class():
    assert targets.class_reference(DistributedWorker) == "drumline.worker:DistributedWorker"
    assert targets.resolve("drumline.worker:DistributedWorker") is DistributedWorker


def test_classes_that_nobody_finds_again():
    class Local(DistributedWorker): ...

    with pytest.raises(ConfigurationError, match="inside a function; move the class to the module level of a file"):
        targets.class_reference(Local)
    made = type("ModuleLevel", (DistributedWorker,), {"__module__": __name__, "__qualname__": "ModuleLevel"})
    with pytest.raises(ConfigurationError, match="move the class to the module level"):
        targets.class_reference(made)


SCRIPT = WORKER + "from drumline import targets\nclass W(DistributedWorker): ...\nprint(targets.class_reference(W))\n"


def python(*arguments: str, cwd: Path | None = None, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_class_of_a_script(tmp_path):
    path = write(tmp_path, SCRIPT)
    reference = python(path.name, cwd=tmp_path).strip()
    assert reference == f"{path}:W"
    assert targets.resolve(reference).__module__ == path.stem


def test_the_class_of_a_module_that_is_run(tmp_path):
    package = f"p{uuid.uuid4().hex[:8]}"
    write(tmp_path, SCRIPT, f"{package}/__init__.py")
    write(tmp_path, SCRIPT, f"{package}/tool.py")
    assert python("-m", f"{package}.tool", cwd=tmp_path).split() == [f"{package}:W", f"{package}.tool:W"]


def test_the_class_of_a_session():
    check = SCRIPT.replace(
        "print(targets.class_reference(W))",
        "try: targets.class_reference(W)\nexcept targets.ConfigurationError as error: print(error)",
    )
    for arguments, stdin in ((("-c", check), ""), ((), check)):
        assert "interactive session; move the class to the module level of a file" in python(*arguments, stdin=stdin)


def test_what_importing_this_module_loads():
    code = (
        "import sys, drumline.targets; print(*sorted(m for m in ('pydantic', 'yaml', 'fastapi') if m in sys.modules))"
    )
    assert python("-c", code).strip() == ""
