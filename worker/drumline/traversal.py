"""Walking over a value that a user made: what is plain, what becomes plain, what is refused and at which place.

A user's value may hold anything: cycles, locks, classes that lie. The walk decides by the real class of an object
(never by a class's name or a ``__class__`` property) and turns every failure into an error that names the place.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import decimal
import enum
import pathlib
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import msgspec

from drumline.errors import EncodingError
from drumline.images import EncodedImage
from drumline.tensors import UnfitError

#: Containers inside containers; deeper is refused (a cycle always is).
MAX_DEPTH = 256
LEAVES = frozenset({str, int, float, bool, type(None)})
_CAREFUL_LEAVES = frozenset({float, bool, type(None)})
_KEYS = frozenset({str, int})
_CONTAINERS = frozenset({dict, list, tuple})
_LISTS = (
    list,
    tuple,
    set,
    frozenset,
    collections.deque,
    range,
    collections.abc.KeysView,
    collections.abc.ValuesView,
    collections.abc.ItemsView,
)
_SHOWN_PARTS = 12
_LARGE = 64


def is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Tell whether msgpack carries ``value`` as it is (but for integers and texts out of range).

    Every request and result passes here, so it is written for speed: a loop beats sets while containers are small.
    """
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str and type(key) is not int:
                return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return kind in LEAVES
    if len(value) > _LARGE and LEAVES.issuperset(map(type, value)):
        return True
    for item in value:
        kind = type(item)
        if kind not in LEAVES and (kind not in _CONTAINERS or depth <= 1 or not is_plain(item, depth - 1)):
            return False
    return True


class RefusedError(Exception):  # internal: becomes an EncodingError at the top of the walk
    """Something cannot be carried; ``parts`` collects the way back to the root."""

    def __init__(self, message: str) -> None:
        self.parts: list[str | int] = []
        super().__init__(message)


def place(root: str, parts: list[str | int]) -> str:
    """Return ``result.images[2]`` for the root ``result`` and the parts ``[2, "images"]`` (innermost first)."""
    shown = [_part(part) for part in reversed(parts)]
    if len(shown) > _SHOWN_PARTS:
        shown[_SHOWN_PARTS // 2 : 1 - _SHOWN_PARTS // 2] = ["..."]
    return root + "".join(shown)


def _part(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]" if part.bit_length() < 64 else "[...]"
    if part.isidentifier() and len(part) <= 40:
        return f".{part}"
    return f"[{part[:40] + '...' if len(part) > 40 else part!a}]"


def safe_text(error: BaseException) -> str:
    """Return the type and text of an exception that a user's class raised, whatever its ``__str__`` does."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text[:500].encode("utf-8", "backslashreplace").decode()


class Walker:
    """Turns a value into one that msgpack carries; subclasses say what becomes of the parts it has no type for.

    ``careful`` looks at every single text and integer; without it the two passes of msgpack find the bad ones faster.
    """

    def __init__(self, root: str, *, careful: bool = True) -> None:
        self._root = root
        self._careful = careful
        self._leaves = _CAREFUL_LEAVES if careful else LEAVES

    def run(self, value: Any) -> Any:
        """Walk over ``value``.

        Raises:
            EncodingError: something in it cannot be carried; the message starts with its place.
        """
        try:
            return self.walk(value, MAX_DEPTH)
        except RefusedError as refused:
            raise EncodingError(f"{place(self._root, refused.parts)}: {refused}") from refused.__cause__
        except (RecursionError, MemoryError, RuntimeError) as error:
            raise EncodingError(f"{self._root}: cannot be read: {safe_text(error)}") from error

    # --- what subclasses decide

    def bytes_(self, value: Any) -> Any:
        """Carry bytes, a bytearray or a memoryview."""
        raise NotImplementedError

    def tensor(self, value: Any) -> Any:
        """Carry a torch tensor."""
        raise NotImplementedError

    def array(self, value: Any) -> Any:
        """Carry a numpy array."""
        raise NotImplementedError

    def image(self, value: Any) -> Any:
        """Carry a PIL image."""
        raise NotImplementedError

    def encoded(self, value: EncodedImage) -> Any:
        """Carry an encoded image."""
        raise NotImplementedError

    def exact(self, value: Any) -> Any:
        """Carry a date, time, duration, decimal, UUID or an integer beyond 64 bits."""
        raise NotImplementedError

    # --- the walk

    def walk(self, value: Any, depth: int) -> Any:
        """Return the plain form of ``value``, which may hold ``depth`` levels of containers."""
        kind = type(value)
        if kind in self._leaves:
            return value
        if kind is dict:
            return self._mapping(value, depth)
        if kind is list or kind is tuple:
            return self._sequence(value, depth)
        try:
            return self._other(value, kind, depth)
        except RefusedError:
            raise
        except UnfitError as unfit:
            raise RefusedError(self._message(str(unfit))) from None
        except Exception as error:
            raise RefusedError(f"a value of type {type_name(kind)} could not be read ({safe_text(error)})") from error

    def _sequence(self, items: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        if depth == 0:
            self._too_deep()
        if self._leaves.issuperset(map(type, items)):
            return list(items)
        done = []
        index = 0
        try:
            for index, item in enumerate(items):  # noqa: B007 - read below
                done.append(self.walk(item, depth - 1))
        except RefusedError as refused:
            refused.parts.append(index)
            raise
        return done

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> dict[str | int, Any]:
        if depth == 0:
            self._too_deep()
        plain_keys = not self._careful and _KEYS.issuperset(map(type, mapping))
        if plain_keys and self._leaves.issuperset(map(type, mapping.values())):
            return dict(mapping)
        done: dict[str | int, Any] = {}
        name: str | int | None = None
        try:
            for key, item in mapping.items():
                name = None
                name = key if plain_keys else self._key(key)
                done[name] = self.walk(item, depth - 1)
        except RefusedError as refused:
            if name is not None:
                refused.parts.append(name)
            raise
        return done

    def _key(self, key: Any) -> str | int:
        kind = type(key)
        while issubclass(kind, enum.Enum):
            key = key.value
            kind = type(key)
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(kind, getattr(numpy, "integer", ())):
            key = int(key)
        elif issubclass(kind, str):
            return self._text(str.__str__(key))
        if isinstance(key, int) and kind is not bool:
            if not -(1 << 63) <= key < 1 << 64:
                raise RefusedError("a key beyond 64 bits cannot be carried; make it a string")
            return int(key)
        raise RefusedError(f"a key of type {type_name(kind)} cannot be carried; make it a string")

    def _text(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"a text with a lone surrogate at character {error.start} cannot be carried; "
                "decode it with errors='replace'"
            ) from None
        return text

    def _other(self, value: Any, kind: type, depth: int) -> Any:
        builder = _BY_CLASS.get(kind)
        if builder is None:
            builder = _loaded_class(kind) or _base_class(kind)
        if builder is None:
            self._refuse(value, kind)
        return builder(self, value, depth)

    def _too_deep(self) -> NoReturn:
        raise RefusedError(f"nested deeper than {MAX_DEPTH} levels, or it contains itself; return a flatter value")

    def _message(self, text: str) -> str:
        what, _, cure = text.partition("; ")
        return f"{what} cannot be carried; {cure}" if cure else f"{what} cannot be carried"

    def _refuse(self, value: Any, kind: type) -> NoReturn:
        name = getattr(value, "__name__", None) if kind in _NAMED else None
        what = f"{name} of type {type_name(kind)}" if isinstance(name, str) else f"a value of type {type_name(kind)}"
        what = what.encode("utf-8", "backslashreplace").decode()
        verb = "pass" if self._root == "payload" else "return"
        cure = f"{verb} numbers, texts, lists, dicts, bytes, tensors, arrays or PIL images"
        if kind in _LAZY:
            cure = f"{verb} what it produces, for example list(...)"
        elif kind is complex:
            cure = f"{verb} [real, imaginary]"
        elif kind.__name__ in ("Tensor", "Image", "ndarray"):
            cure = f"it is not the class of torch, PIL or numpy that has this name; {verb} one of theirs"
        raise RefusedError(f"{what} cannot be carried; {cure}")


def type_name(kind: type) -> str:
    """Return ``module.Class``, without the module for built-in types."""
    module = kind.__module__
    name = kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    return name[:200].encode("utf-8", "backslashreplace").decode()


_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
_LAZY = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, map, filter, zip, enumerate, reversed)

Builder = Callable[[Walker, Any, int], Any]


def _number(walker: Walker, value: Any, _depth: int) -> Any:
    value = int(value)
    return value if -(1 << 63) <= value < 1 << 64 else walker.exact(value)


def _list(walker: Walker, value: Any, depth: int) -> Any:
    return walker._sequence(list(value), depth)


def _dict(walker: Walker, value: Any, depth: int) -> Any:
    return walker._mapping(dict(value), depth)


def _again(convert: Callable[[Any], Any]) -> Builder:
    """Convert, then walk over what came out: a level of its own, so that no conversion can go on forever."""

    def builder(walker: Walker, value: Any, depth: int) -> Any:
        if depth == 0:
            walker._too_deep()
        return walker.walk(convert(value), depth - 1)

    return builder


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _numpy_scalar(walker: Walker, value: Any, depth: int) -> Any:
    item = value.item()
    if type(value).__name__ in ("datetime64", "timedelta64") or type(item).__module__ == "numpy":
        raise UnfitError(f"a numpy.{type(value).__name__}; return a datetime, a number or an array")
    return walker.walk(item, depth)


_exact: Builder = lambda walker, value, _depth: walker.exact(value)  # noqa: E731
_bytes: Builder = lambda walker, value, _depth: walker.bytes_(value)  # noqa: E731
_BY_CLASS: dict[type, Builder] = {
    str: lambda walker, value, _depth: walker._text(value),
    int: _number,
    bytes: _bytes,
    bytearray: _bytes,
    memoryview: _bytes,
    set: _list,
    frozenset: _list,
    datetime.datetime: _exact,
    datetime.date: _exact,
    datetime.time: _exact,
    datetime.timedelta: _exact,
    decimal.Decimal: _exact,
    uuid.UUID: _exact,
    EncodedImage: lambda walker, value, _depth: walker.encoded(value),
}
#: Classes of packages that this process may not have loaded: module that defines them, name, builder.
_LOADED: tuple[tuple[str, str, Builder], ...] = (
    ("torch", "Tensor", lambda walker, value, _depth: walker.tensor(value)),
    ("PIL.Image", "Image", lambda walker, value, _depth: walker.image(value)),
    ("numpy", "ndarray", lambda walker, value, _depth: walker.array(value)),
    ("numpy", "generic", _numpy_scalar),
    ("pydantic.main", "BaseModel", _again(lambda value: value.model_dump(warnings=False))),
    ("pydantic", "AnyUrl", _again(str)),
)
#: Base classes in the order in which they decide; the first one wins.
_BASES: tuple[tuple[Any, Builder], ...] = (
    (enum.Enum, _again(lambda value: value.value)),
    (str, lambda walker, value, _depth: walker._text(str.__str__(value))),
    (int, _number),
    (float, lambda _walker, value, _depth: float.__float__(value)),
    ((bytes, bytearray), _bytes),
    ((datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID), _exact),
    (pathlib.PurePath, _again(str)),
    (Mapping, _dict),
    (_LISTS, _list),
    (msgspec.Struct, _again(msgspec.structs.asdict)),
)


def _loaded_class(kind: type) -> Builder | None:
    for module_name, name, builder in _LOADED:
        module = sys.modules.get(module_name)
        # vars(): a package that loads names on demand must not be made to do so; a half-imported one has none yet
        known = None if module is None else vars(module).get(name)
        if isinstance(known, type) and issubclass(kind, known):
            return builder
    return None


def _base_class(kind: type) -> Builder | None:
    for base, builder in _BASES:
        if issubclass(kind, base):
            return builder
    return _again(_fields) if dataclasses.is_dataclass(kind) else None
