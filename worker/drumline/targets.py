"""What to run: a TARGET as people write it, and references to classes that another process can resolve.

A *reference* is a string that means the same class in every process of this machine:

=========================== ===========================================================
``/srv/app.py:SDXL``        class ``SDXL`` of that file (``path.py`` alone: its only App, else its only worker class)
``/srv/app:SDXL``           class ``SDXL`` of module ``app``, looked for in the folder ``/srv`` first
``package.module:SDXL``     class ``SDXL`` of a module on ``sys.path``
=========================== ===========================================================

Importing this module loads neither pydantic nor YAML: the process that forks the ranks imports it too.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import keyword
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from drumline.details import did_you_mean
from drumline.errors import ConfigurationError

if TYPE_CHECKING:
    from drumline.contract import RunnerSettings

_FORMS = "write path.py, path.py:Class, module:Class or a DistributedApp manifest (app.yaml)"


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed TARGET.

    Attributes:
        kind: ``file`` (path.py), ``module`` (module:Class) or ``manifest`` (app.yaml).
        path: the file or manifest, absolute; for a module the folder that is searched first, or None.
        module: dotted module name, only for ``module``.
        class_name: the class asked for (dotted when nested), or None: the only one.
    """

    kind: Literal["file", "module", "manifest"]
    path: Path | None
    module: str = ""
    class_name: str | None = None

    @property
    def reference(self) -> str:
        """The class reference that :func:`resolve` takes; a manifest has none of its own (see :func:`launch_plan`)."""
        if self.kind == "manifest":
            raise ConfigurationError(f"{self.path}: a manifest is not a class; its spec.workerClass names one")
        if self.kind == "module":
            return f"{self.path / self.module if self.path else self.module}:{self.class_name}"
        return f"{self.path}:{self.class_name}" if self.class_name else str(self.path)

    @property
    def title(self) -> str:
        """A name for the app, fit for a URL: ``parallel_sdxl.py`` gives ``parallel-sdxl``."""
        stem = self.module.rpartition(".")[2] if self.kind == "module" or self.path is None else self.path.stem
        words = "".join(c if c.isascii() and c.isalnum() else "-" for c in stem.lower())
        return words.strip("-")[:48].rstrip("-") or "app"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What ``drumline run TARGET`` has to do.

    Attributes:
        settings: the settings, with ``settings.target`` a class reference.
        env: environment variables that the target asks for (a manifest's ``spec.env``).
        notes: sentences about parts of a manifest that mean nothing, or something else, on one machine.
    """

    settings: RunnerSettings
    env: dict[str, str]
    notes: tuple[str, ...] = ()


def parse(text: str, *, folder: Path | None = None) -> Target:
    """Parse a TARGET; nothing is imported.

    Args:
        text: ``path.py``, ``path.py:Class``, ``module:Class``, ``folder/module:Class`` or a manifest's path.
        folder: base of relative paths and first place to look for a module; default: the current folder.

    Raises:
        ConfigurationError: no such file, or none of these forms.
    """
    base = (folder or Path.cwd()).absolute()
    head, colon, class_name = text.partition("::") if "::" in text else text.rpartition(":")
    if not colon:
        head, class_name = text, ""
    if not head or (colon and not _is_dotted(class_name)):
        raise ConfigurationError(f"target {text!r}: {_FORMS}")
    path = _join(base, head)
    if path.suffix in {".yaml", ".yml"}:
        if colon:
            raise ConfigurationError(f"target {text!r}: a manifest names its class itself, in spec.workerClass")
        return Target("manifest", _existing(path))
    if path.suffix == ".py":
        return Target("file", _existing(path), class_name=class_name or None)
    if not colon:
        raise ConfigurationError(_not_a_target(text, path))
    if not _is_dotted(path.name):
        raise ConfigurationError(f"target {text!r}: {path.name!r} is not a module name; {_FORMS}")
    return Target("module", path.parent, module=path.name, class_name=class_name)


def launch_plan(text: str, *, folder: Path | None = None, **overrides: Any) -> LaunchPlan:
    """Read TARGET into settings; ``overrides`` (fields of RunnerSettings, None is ignored) win.

    Raises:
        ConfigurationError: the target, the manifest or an override is wrong.
    """
    from drumline.contract import RunnerSettings

    target = parse(text, folder=folder)
    given = {name: value for name, value in overrides.items() if value is not None}
    if target.kind != "manifest":
        return LaunchPlan(RunnerSettings.checked({"target": target.reference, "name": target.title, **given}), {})
    from drumline.api import manifests

    assert target.path is not None
    app = manifests.load_manifest(target.path)
    settings = manifests.to_settings(app, folder=target.path.parent)
    if given:
        settings = RunnerSettings.checked({**settings.model_dump(), **given})
    return LaunchPlan(settings, manifests.plain_env(app), manifests.local_notes(app))


def resolve(reference: str) -> type:
    """Import the class that ``reference`` names.

    Raises:
        ConfigurationError: the file, module or class is missing, or the user's module raised while it was imported
            (then ``__cause__`` is the user's exception, with a traceback that starts in the user's code).
    """
    head, colon, class_name = reference.rpartition(":")
    if not colon or head.endswith(".py") or reference.endswith(".py"):
        file, name = (head, class_name) if head.endswith(".py") else (reference, None)
        return find_class(load_file(file), name)
    folder, slash, module = head.rpartition("/")
    if slash:
        _prefer(folder or "/")
    return find_class(_import(module, head), class_name)


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file as a module, once per process.

    The module gets the same name in every process: the file's stem (dotted, when the file lies in a package, so that
    its relative imports work), or the stem and a hash when that name belongs to somebody else. It is never
    ``__main__``, so an ``if __name__ == "__main__"`` block does not run. The file's folder is put on ``sys.path``.

    Raises:
        ConfigurationError: as :func:`resolve`.
    """
    file = _existing(Path(path).absolute())
    root, name = _module_name(file)
    _prefer(str(root))
    loaded = sys.modules.get(name)
    if loaded is not None and _is_file(loaded, file):
        return loaded
    if "." in name:
        return _import(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise _import_failed(str(file), error) from error
    return module


def find_class(module: ModuleType, name: str | None = None) -> type:
    """Return the class ``name`` of ``module``; without a name its only App, else its only worker class.

    Raises:
        ConfigurationError: no such class (with the nearest names), none at all, or several.
    """
    where = getattr(module, "__file__", None) or module.__name__
    if name is not None:
        return _named_class(module, name, where)
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    for kind, base in (("App", _app()), ("worker", _worker())):
        found = sorted({cls.__qualname__ for cls in own if base is not None and issubclass(cls, base)})
        if len(found) > 1:
            raise ConfigurationError(
                f"{where} defines several {kind} classes: {', '.join(found)}; name one: {where}:{found[0]}"
            )
        if found:
            return _named_class(module, found[0], where)
    raise ConfigurationError(
        f"{where} defines neither an App nor a DistributedWorker; subclass drumline.App or "
        "drumline.distributed.DistributedWorker, or name a class that the file imports: path.py:Class"
    )


def class_reference(cls: type) -> str:
    """Return a reference to ``cls`` that :func:`resolve` understands in another process.

    Raises:
        ConfigurationError: the class cannot be found again from outside (defined in a function or a REPL, or replaced).
    """
    cure = "move the class to the module level of a file"
    if "<locals>" in cls.__qualname__:
        raise ConfigurationError(f"class {cls.__qualname__} is defined inside a function; {cure}")
    module = sys.modules.get(cls.__module__)
    found: Any = module
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise ConfigurationError(f"class {cls.__qualname__} is not what {cls.__module__}.{cls.__qualname__} is; {cure}")
    assert module is not None
    name, file = cls.__module__, getattr(module, "__file__", None)
    spec = getattr(module, "__spec__", None)
    if name == "__main__":
        if spec is not None:  # python -m package.module
            return f"{spec.name}:{cls.__qualname__}"
        if file is None or not Path(file).is_file():
            raise ConfigurationError(f"class {cls.__qualname__} lives in an interactive session; {cure}")
    elif file is None or _importable_as(name, file):
        return f"{name}:{cls.__qualname__}"
    return f"{Path(file).absolute()}:{cls.__qualname__}"


# --- names and paths


def _join(base: Path, text: str) -> Path:
    return Path(base, os.path.expanduser(text))  # this one leaves a ~ that it cannot resolve


def _existing(path: Path) -> Path:
    if os.path.isfile(path):  # unlike Path.is_file, it takes any name
        return path.resolve()
    if not os.path.isdir(path.parent):
        raise ConfigurationError(f"{path}: no such file; the folder {path.parent} does not exist")
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith((".py", ".yaml", ".yml"))]
    except OSError:
        names = []
    raise ConfigurationError(f"{path}: no such file{did_you_mean(path.name, names)}")


def _not_a_target(text: str, path: Path) -> str:
    for candidate in (Path(f"{path}.py"), path / "app.yaml", path / "app.py"):
        if os.path.isfile(candidate):
            return f"target {text!r}: did you mean {candidate}?"
    return f"target {text!r}: {_FORMS}"


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in text.split("."))


def _prefer(folder: str) -> None:
    """Look for modules in ``folder`` first, as Python does for a script's own folder."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()


def _module_name(file: Path) -> tuple[Path, str]:
    """The folder to put on ``sys.path`` and the module name for ``file`` (see :func:`load_file`)."""
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").is_file() and _is_dotted(root.name):
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    if len(parts) > 1 and _is_dotted(name):
        return root, name
    root = file.parent
    if _is_dotted(file.stem) and not _taken(file, root):
        return root, file.stem
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    return root, f"{''.join(c if c.isalnum() else '_' for c in file.stem)}_{digest}"


def _taken(file: Path, root: Path) -> bool:
    """Whether ``import <stem>`` means another module than ``file`` for anybody else in this process."""
    if file.stem in sys.stdlib_module_names or file.stem in sys.builtin_module_names:
        return True
    loaded = sys.modules.get(file.stem)
    if loaded is not None:
        return not _is_file(loaded, file)
    others = [entry for entry in sys.path if entry and Path(entry) != root]
    spec = importlib.machinery.PathFinder.find_spec(file.stem, others)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() != file


def _is_file(module: ModuleType, file: Path) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and Path(origin).resolve() == file.resolve()


def _importable_as(name: str, file: str) -> bool:
    """Whether a fresh process with this ``sys.path`` finds ``file`` when it imports ``name``."""
    search: Any = None
    spec = None
    for position, part in enumerate(parts := name.split(".")):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: position + 1]), search)
        if spec is None:
            # Not on the path: an import hook (an editable install) may still find it, but only by its own name.
            hooked = importlib.util.find_spec(name) if part == name else None
            return hooked is not None and hooked.origin == file
        search = spec.submodule_search_locations
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(file).resolve()


# --- importing user code


def _import(name: str, asked: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _import_failed(asked, error) from error
        found = [Path(entry, *name.split(".")).with_suffix(".py") for entry in sys.path]
        hint = next((f"; did you mean {path}?" for path in found if path.is_file()), "")
        raise ConfigurationError(
            f"{asked}: no module named {error.name!r} on the search path{hint or '; check the spelling or install it'}"
        ) from None
    except (Exception, SystemExit) as error:
        raise _import_failed(asked, error) from error


def _import_failed(asked: str, error: BaseException) -> ConfigurationError:
    """The user's module raised: that exception is the cause, without our own and importlib's frames."""
    while error.__traceback__ is not None and _is_machinery(error.__traceback__.tb_frame.f_code.co_filename):
        error.__traceback__ = error.__traceback__.tb_next
    if isinstance(error, SyntaxError):
        return ConfigurationError("".join(traceback.format_exception_only(error)).strip())
    what = "it called exit" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error)).rstrip()
    return ConfigurationError(f"cannot import {asked}: {what}\n{text}")


def _is_machinery(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen importlib") or filename == importlib.__file__


def _app() -> type | None:
    return _loaded("drumline.app", "App")


def _worker() -> type | None:
    return _loaded("drumline.worker", "DistributedWorker")


def _loaded(module: str, name: str) -> type | None:
    """A class of ours, only if its module is loaded: without it the user's file cannot hold a subclass."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _named_class(module: ModuleType, name: str, where: str) -> type:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if isinstance(value, type)]
            hint = did_you_mean(part, known) or (f"; it has {', '.join(sorted(known))}" if known else "")
            raise ConfigurationError(f"{where} has no class {name!r}{hint}")
        found = getattr(found, part)
    bases = [base for base in (_app(), _worker()) if base]
    if not isinstance(found, type) or not issubclass(found, tuple(bases)):
        raise ConfigurationError(
            f"{where}: {name} is not a subclass of drumline.App or drumline.distributed.DistributedWorker"
        )
    return found
