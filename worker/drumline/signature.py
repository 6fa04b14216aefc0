"""The request model of a worker, read from the signature of its ``__call__``.

Ranks use :meth:`RequestModel.bind` on every request; the HTTP server shows :meth:`RequestModel.json_schema` in OpenAPI.
A signature without annotations binds without pydantic, which is then never imported.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from drumline.details import invalid, problem, unknown_name
from drumline.errors import ConfigurationError

if TYPE_CHECKING:
    from drumline.validation import Validator

#: Keys that a payload may not have: the call itself fills them.
RESERVED = ("self", "streaming")
_RESERVED = "The call fills this in by itself; remove it from the request"
_EMPTY = inspect.Parameter.empty
_NOWHERE = "<nowhere>"


class RequestModel:
    """What one worker class takes.

    Attributes:
        title: name of the class (or function).
        allows_extra: the signature has ``**kwargs``, so unknown keys are passed on.
        takes_streaming: the call accepts the keyword ``streaming``.
        required: names without a default, in order.
        defaults: defaults of the other names.
    """

    def __init__(self, target: Callable[..., Any] | type) -> None:
        self.title, function, owner = _callable_of(target)
        parameters, self._function = _parameters(function, skip_self=isinstance(target, type))
        streaming = parameters.pop("streaming", None)
        self.allows_extra = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_streaming = self.allows_extra or (
            streaming is not None and streaming.kind is not streaming.POSITIONAL_ONLY
        )
        fields = _fillable(self.title, parameters)
        self._owner = owner
        self._metadata = {name: p.default for name, p in fields.items() if _is_field_info(p.default)}
        self._fields = fields
        self.defaults = {name: p.default for name, p in fields.items() if p.default is not _EMPTY}
        self.required = tuple(name for name, p in fields.items() if p.default is _EMPTY)
        #: pydantic ``Field(...)`` written as a default: the call itself would get the FieldInfo, so bind fills it in.
        self._filled: dict[str, Callable[[], Any]] = {}
        for name, info in self._metadata.items():
            if info.is_required():
                del self.defaults[name]
                self.required = tuple(n for n in fields if n not in self.defaults)
            else:
                self._filled[name] = _factory(info)
                self.defaults[name] = self._filled[name]()
        self._known = frozenset(fields)
        self._untyped = not self._metadata and all(
            p.annotation in (_EMPTY, Any, "Any", "typing.Any") for p in fields.values()
        )

    def bind(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for one call.

        Annotated parameters are validated and coerced by pydantic's rules; values of parameters without a usable
        annotation and extra values are passed on untouched. Defaults are left to the call.

        Args:
            payload: the request, a mapping of names to values; it is not changed.

        Raises:
            InvalidPayload: a name is missing, unknown or reserved, or a value does not fit; ``detail`` says which.
        """
        if type(payload) is not dict and not isinstance(payload, Mapping):
            raise invalid([problem(["body"], "Input should be a valid dictionary", "dict_type")])
        if "streaming" in payload or "self" in payload:
            raise invalid([problem(["body", name], _RESERVED, "reserved_name") for name in RESERVED if name in payload])
        if self._untyped:
            return self._bind_untyped(payload)
        values = self._validator.validate(dict(payload))
        for name, make in self._filled.items():
            if name not in values:
                values[name] = make()
        return values

    def json_schema(self) -> dict[str, Any]:
        """The request as JSON Schema (draft 2020-12): an object, titled like the class; shared types in ``$defs``."""
        properties: dict[str, Any]
        if self._untyped:
            schema: dict[str, Any] = {"type": "object"}
            properties = {name: {"title": _words(name)} for name in self._fields}
        else:
            schema = self._validator.json_schema()
            properties = schema.get("properties", {})
        for name, text in _argument_docs(self._function, self._owner).items():
            if name in properties:
                properties[name].setdefault("description", text)
        for name, default in self.defaults.items():
            value = _jsonable(default)
            if value is not _NOWHERE and name in properties:
                properties[name]["default"] = value
        schema["title"] = self.title
        schema["properties"] = properties
        schema["additionalProperties"] = self.allows_extra
        schema.pop("required", None)
        if self.required:
            schema["required"] = list(self.required)
        return schema

    def _bind_untyped(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        known, extra = self._known, self.allows_extra
        wrong = [name for name in payload if name not in known and not (extra and isinstance(name, str))]
        missing = [name for name in self.required if name not in payload]
        if wrong or missing:
            raise invalid(
                [problem(["body", name], "Field required", "missing") for name in missing]
                + [_wrong_key(name, known) for name in wrong]
            )
        return dict(payload)

    @functools.cached_property
    def _validator(self) -> Validator:
        from drumline.validation import Validator

        hints = _hints(self._function, self._owner, self._fields)
        return Validator(self.title, hints, self.required, self._metadata, allow_extra=self.allows_extra)


def request_model(target: Callable[..., Any] | type) -> RequestModel:
    """Read the request model of a worker class (from its ``__call__``) or of a plain callable.

    ``self`` and ``streaming`` are not part of a request. ``**kwargs`` allows additional properties; ``*args`` is
    ignored, and so are positional-only parameters with a default (a JSON object cannot fill them).

    Raises:
        ConfigurationError: a positional-only parameter has no default, so that no request could ever be served.
    """
    return _of_class(target) if isinstance(target, type) else RequestModel(target)


@functools.lru_cache(maxsize=64)
def _of_class(cls: type) -> RequestModel:
    # Once per process: what the parent of the ranks has built, they inherit.
    return RequestModel(cls)


# --- reading the signature


def _callable_of(target: Callable[..., Any] | type) -> tuple[str, Callable[..., Any], type | None]:
    if not isinstance(target, type):
        return getattr(target, "__name__", type(target).__name__), target, None
    for cls in target.__mro__:
        if "__call__" in vars(cls):
            return target.__name__, vars(cls)["__call__"], cls
    raise ConfigurationError(f"class {target.__name__} has no __call__ method; a worker serves requests with it")


def _parameters(
    function: Callable[..., Any], *, skip_self: bool
) -> tuple[dict[str, inspect.Parameter], Callable[..., Any]]:
    inner = inspect.unwrap(function)
    try:
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            signature = inspect.signature(function, annotation_format=Format.FORWARDREF)
        else:
            signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin or an extension type without a signature: pass everything on
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}, inner
    parameters = dict(signature.parameters)
    first = next(iter(parameters), None)
    if first is not None and (skip_self or first == "self") and parameters[first].kind in _POSITIONAL:
        del parameters[first]
    return parameters, inner


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _fillable(title: str, parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    fields = {}
    for name, parameter in parameters.items():
        if parameter.kind in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}:
            continue
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            fields[name] = parameter
        elif parameter.default is _EMPTY:
            raise ConfigurationError(
                f"{title}: the positional-only parameter {name!r} cannot be filled from a request; "
                "remove the '/' from the signature of __call__"
            )
    return fields


def _hints(function: Callable[..., Any], owner: type | None, fields: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Resolve each annotation by itself: one that cannot be resolved (a TYPE_CHECKING import) becomes Any."""
    namespace = dict(vars(owner)) if owner is not None else {}
    hints = {}
    for name, parameter in fields.items():
        hint: Any = Any
        if parameter.annotation is not _EMPTY:

            def probe() -> None: ...

            probe.__annotations__ = {name: parameter.annotation}
            try:
                hint = get_type_hints(probe, getattr(function, "__globals__", {}), namespace, include_extras=True)[name]
            except Exception:  # whatever a user's annotation raises, the parameter still takes a value
                hint = Any
        # `seed: int = None` is common, and its callers do send null.
        hints[name] = hint | None if parameter.default is None and _can_be_optional(hint) else hint
    return hints


def _can_be_optional(hint: Any) -> bool:
    if hint is Any:
        return False
    try:
        return bool(hint | None)
    except TypeError:
        return False


def _is_field_info(default: Any) -> bool:
    return type(default).__module__.startswith("pydantic.") and type(default).__name__ == "FieldInfo"


def _factory(info: Any) -> Callable[[], Any]:
    return lambda: info.get_default(call_default_factory=True, validated_data={})


def _wrong_key(name: Any, known: Collection[str]) -> dict[str, Any]:
    if isinstance(name, str):
        return unknown_name(name, known)
    return problem(["body", str(name)], "Keys should be strings", "invalid_key")


# --- words for the schema


def _words(name: str) -> str:
    return name.replace("_", " ").strip().title()


def _jsonable(value: Any) -> Any:
    """``value`` as JSON data, or a marker when JSON cannot show it."""
    if value is None or (isinstance(value, (bool, int, str)) and type(value).__module__ == "builtins"):
        return value
    try:
        if "pydantic_core" in sys.modules:
            from pydantic_core import to_jsonable_python

            value = to_jsonable_python(value)
        json.dumps(value, allow_nan=False)
    except Exception:  # serialisers of user types may raise anything; a default is only shown
        return _NOWHERE
    return value


_ARGS = re.compile(r"^(?P<indent>[ \t]*)(?:Args|Arguments|Parameters):[ \t]*\n", re.MULTILINE)
_ITEM = re.compile(r"^\*{0,2}(?P<name>\w+)[ \t]*(?:\([^)\n]*\))?:[ \t]*(?P<text>.*)$")


def _argument_docs(function: Callable[..., Any], owner: type | None) -> dict[str, str]:
    """Descriptions from the ``Args:`` section of the docstring (google style) of the call, else of its class."""
    for source in (function, owner):
        text = inspect.cleandoc(getattr(source, "__doc__", None) or "")
        start = _ARGS.search(text)
        if start is None:
            continue
        docs: dict[str, str] = {}
        name, outer, inner = "", len(start["indent"]), None
        for line in text[start.end() :].splitlines():
            depth = len(line) - len(line.lstrip())
            if not line.strip():
                continue
            if depth <= outer:
                break
            inner = depth if inner is None else inner
            item = _ITEM.match(line.strip()) if depth == inner else None
            if item:
                name = item["name"]
                docs[name] = item["text"]
            elif name:
                docs[name] = f"{docs[name]} {line.strip()}".strip()
        return docs
    return {}
