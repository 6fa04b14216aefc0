"""Tells an App from a worker by reading its source, so that the serving process need not import a worker's module.

A worker's module imports torch; only its ranks should. What cannot be told from the source (a base class from somewhere
else) is answered with None: then the class has to be imported to know.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drumline.errors import ConfigurationError

Kind = Literal["app", "worker"]

_BASES: dict[str, Kind] = {
    "drumline.App": "app",
    "drumline.app.App": "app",
    "drumline.DistributedWorker": "worker",
    "drumline.distributed.DistributedWorker": "worker",
    "drumline.worker.DistributedWorker": "worker",
}
_LARGEST_SOURCE = 8 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A class of a file.

    Attributes:
        name: its name, dotted when it is nested.
        kind: ``app``, ``worker``, ``other`` (no base class), or None: its bases come from elsewhere.
    """

    name: str
    kind: Kind | Literal["other"] | None


def kind_of(reference: str) -> Kind | None:
    """Return what the class of a reference (see :mod:`drumline.targets`) is, without importing it.

    For a file alone: ``app`` when it defines an App, else ``worker`` when it defines a worker class.

    Returns:
        None when that cannot be told from the source.

    Raises:
        ConfigurationError: the source is not Python.
    """
    head, colon, class_name = reference.rpartition(":")
    if reference.endswith(".py") or not colon:
        head, class_name = reference, ""
    file = Path(head) if head.endswith(".py") else _module_file(head)
    if file is None:
        return None
    found = classes(file)
    if class_name:
        kinds = {each.kind for each in found if each.name == class_name}
        return next((kind for kind in ("app", "worker") if kinds == {kind}), None)
    kinds = {each.kind for each in found}
    return next((kind for kind in ("app", "worker") if kind in kinds), None)


def classes(file: Path) -> list[Found]:
    """Return the classes that a Python file defines at its top level (also below ``if`` and ``try``), and inside those.

    Raises:
        ConfigurationError: the file cannot be read, or is not Python; the message names the line.
    """
    try:
        if file.stat().st_size > _LARGEST_SOURCE:
            return []
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
    except SyntaxError as error:
        text = f": {error.text.strip()}" if error.text else ""
        raise ConfigurationError(f"{file}:{error.lineno}: {error.msg}{text}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigurationError(f"{file}: not a Python file: {error}") from None
    scope = _Scope()
    scope.read(tree.body, "")
    return [Found(name, kind) for name, kind in scope.kinds.items()]


class _Scope:
    """What names mean in a module, in the order of its statements."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind | Literal["other"] | None] = {}
        self._meaning: dict[str, str] = {}

    def read(self, body: Iterable[ast.stmt], prefix: str) -> None:
        for statement in _statements(body):
            match statement:
                case ast.Import(names=names):
                    for each in names:
                        # `import a.b` binds `a`; `import a.b as c` binds c to a.b.
                        top = each.name.partition(".")[0]
                        self._bind(each.asname or top, each.name if each.asname else top)
                case ast.ImportFrom(module=module, names=names, level=level):
                    for each in names:
                        if each.name == "*" and module in {"drumline", "drumline.distributed"} and not level:
                            self._bind_all(module)
                        else:
                            self._bind(each.asname or each.name, f"{'.' * level}{module or ''}.{each.name}")
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._bind(name, self._dotted(value) or "?")
                case ast.ClassDef(name=name, bases=bases, body=inner):
                    full = prefix + name
                    self.kinds[full] = self._kind(bases)
                    self._meaning[full] = f"<here>.{full}"
                    self.read(inner, full + ".")

    def _bind(self, name: str, meaning: str) -> None:
        self._meaning[name] = meaning

    def _bind_all(self, module: str) -> None:
        for base in _BASES:
            home, _, name = base.rpartition(".")
            if home == module:
                self._bind(name, base)

    def _kind(self, bases: list[ast.expr]) -> Kind | Literal["other"] | None:
        if not bases:
            return "other"
        kinds = {self._kind_of_base(base) for base in bases}
        for kind in ("app", "worker"):
            if kind in kinds:
                return kind
        return None if None in kinds else "other"

    def _kind_of_base(self, base: ast.expr) -> Kind | Literal["other"] | None:
        dotted = self._dotted(base)
        if dotted is None:
            return None
        if dotted.startswith("<here>."):
            return self.kinds.get(dotted.removeprefix("<here>."))
        return _BASES.get(dotted)

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Subscript):  # Generic[T]
            return self._dotted(node.value)
        if isinstance(node, ast.Attribute):
            inner = self._dotted(node.value)
            return f"{inner}.{node.attr}" if inner else None
        return self._meaning.get(node.id) if isinstance(node, ast.Name) else None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that run when it is imported, whatever ``if`` or ``try`` they stand in."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _module_file(module: str) -> Path | None:
    """The file of ``module`` (``folder/module`` looks there first), found without importing anything."""
    folder, _, name = module.rpartition("/")
    for entry in [*([folder] if folder else []), *sys.path]:
        path = Path(entry or ".", *name.split("."))
        for candidate in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
