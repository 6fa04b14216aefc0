"""A request's fields validated by pydantic: the typed half of :mod:`drumline.signature`, imported only when needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NotRequired, Required, cast

import pydantic
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails, ValidationError
from typing_extensions import TypedDict  # typing's own misses what pydantic reads, before Python 3.12

from drumline.details import invalid, problem, unknown_name

#: What pydantic raises for a type that it has no schema for (tensors, images) or cannot resolve.
_NO_SCHEMA = (PydanticUserError, TypeError, NameError, AttributeError)


class Validator:
    """Validates whole requests against resolved type hints; a hint without a schema counts as Any.

    Args:
        title: title of the JSON schema.
        hints: resolved type per name; ``Annotated[..., Field(...)]`` is honoured.
        required: names that must be there; the others stay absent when they are not given.
        metadata: extra pydantic ``FieldInfo`` per name.
        allow_extra: keep unknown keys instead of refusing them.
    """

    def __init__(
        self,
        title: str,
        hints: Mapping[str, Any],
        required: Collection[str],
        metadata: Mapping[str, Any],
        *,
        allow_extra: bool,
    ) -> None:
        self._names = tuple(hints)
        hints = {name: Annotated[hint, metadata[name]] if name in metadata else hint for name, hint in hints.items()}

        def build(hints: Mapping[str, Any]) -> pydantic.TypeAdapter[dict[str, Any]]:
            # A TypedDict: any name may be a key (`json`, `model_name`, `_x`), and what comes out are keyword arguments.
            fields = {n: Required[h] if n in required else NotRequired[h] for n, h in hints.items()}
            model = cast("Any", TypedDict)(title, fields)
            model.__pydantic_config__ = pydantic.ConfigDict(extra="allow" if allow_extra else "forbid")
            return pydantic.TypeAdapter(model)

        try:
            self._adapter = build(hints)
            self._adapter.json_schema()
        except _NO_SCHEMA:
            self._adapter = build({name: hint if _has_schema(hint) else Any for name, hint in hints.items()})

    def validate(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the validated values of ``payload`` and, if allowed, its extra ones.

        Raises:
            InvalidPayload: with one detail per problem.
        """
        try:
            return self._adapter.validate_python(payload)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
        raise invalid([_detail(found, self._names) for found in problems])

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of the request, shared types in ``$defs``."""
        return self._adapter.json_schema()


def _has_schema(hint: Any) -> bool:
    try:
        pydantic.TypeAdapter(hint).json_schema()
    except _NO_SCHEMA:
        return False
    return True


def _detail(found: ErrorDetails, known: Collection[str]) -> dict[str, Any]:
    if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
        return unknown_name(str(found["loc"][0]), known)
    return problem(["body", *found["loc"]], found["msg"], found["type"])
