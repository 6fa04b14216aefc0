"""The body of a call: bounded and timed while it is read, then checked against the worker's schema."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
from jsonschema_rs import ValidationError, ValidationErrorKind

from drumline import details, problems
from drumline.errors import InvalidPayload
from drumline.problems import ProblemError
from drumline.server import limits
from drumline.server.body_budget import BodyBudget
from drumline.server.exchange import ClientGoneError, Exchange
from drumline.signature import RESERVED

log = logging.getLogger("drumline.server")

_MEDIA_TYPE_CURE = "Send the payload as JSON, with the header 'Content-Type: application/json'."


def check_size(exchange: Exchange, max_bytes: int) -> None:
    """Refuse by the announced length, before anything of the body is read.

    Raises:
        ProblemError: 413.
    """
    length = exchange.headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise too_large(max_bytes)


def check_length(raw: bytes, max_bytes: int) -> None:
    """Refuse a body that is there, however its length was announced.

    Raises:
        ProblemError: 413.
    """
    if len(raw) > max_bytes:
        raise too_large(max_bytes)


def too_large(max_bytes: int) -> ProblemError:
    """The 413."""
    return ProblemError(problems.make("payload-too-large", f"The body may have up to {max_bytes} bytes."))


async def read(exchange: Exchange, max_bytes: int, budget: BodyBudget) -> bytes:
    """Return the body; ``budget`` counts it until the exchange is released.

    Raises:
        ProblemError: 413 when it grows over ``max_bytes``, 408 when it comes too slowly, 503 when all bodies are too large.
        ClientGoneError: the client left before it was complete.
    """
    if exchange.body_complete:
        message = _there(await exchange.receive())
    else:
        message = await _receive(exchange, limits.BODY_IDLE_SECONDS)
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        check_length(body, max_bytes)
        budget.hold(exchange, len(body))
        return body
    parts = bytearray(body)
    clock = asyncio.get_running_loop().time
    deadline = clock() + limits.body_deadline(max_bytes)
    while message.get("more_body", False):
        if len(parts) > max_bytes:
            raise too_large(max_bytes)
        budget.hold(exchange, len(parts))
        message = await _receive(exchange, min(limits.BODY_IDLE_SECONDS, deadline - clock()))
        parts += message.get("body", b"")
    if len(parts) > max_bytes:
        raise too_large(max_bytes)
    budget.hold(exchange, len(parts))
    return bytes(parts)


async def _receive(exchange: Exchange, timeout: float) -> Mapping[str, Any]:
    try:
        async with asyncio.timeout(timeout):
            message = await exchange.receive()
    except TimeoutError:
        raise ProblemError(problems.make("body-timeout", "The rest of the body did not arrive.")) from None
    return _there(message)


def _there(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["type"] == "http.disconnect":
        raise ClientGoneError("the client left before its request was read")
    return message


def check_media_type(exchange: Exchange, *, strict: bool = False) -> None:
    """Refuse what is not JSON; a request without a body needs no content type.

    ``curl -d`` says ``application/x-www-form-urlencoded`` whatever it sends, so that is taken for JSON too, unless a
    browser sends it: other sites' pages may post forms here without asking, but not JSON. ``strict`` takes no form.

    Raises:
        ProblemError: 415.
    """
    headers = exchange.headers
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ProblemError(problems.make("unsupported-media-type", "Send the body without a Content-Encoding."))
    raw = headers.get(b"content-type")
    if raw == b"application/json":
        return
    if raw is None:
        if headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers:
            return
        raise ProblemError(problems.make("unsupported-media-type", _MEDIA_TYPE_CURE))
    media, _, parameters = raw.decode("latin-1").lower().partition(";")
    media = media.strip()
    from_browser = b"origin" in headers or b"sec-fetch-site" in headers
    charset = parameters.partition("charset=")[2].split(";")[0].strip(" \"'")
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise ProblemError(problems.make("unsupported-media-type", f"JSON is UTF-8, not {charset[:40]}."))
    if media == "application/json" or (media.startswith("application/") and media.endswith("+json")):
        return
    if media == "application/x-www-form-urlencoded" and not from_browser and not strict:
        return
    raise ProblemError(problems.make("unsupported-media-type", _MEDIA_TYPE_CURE))


class PayloadCheck:
    """Checks payloads against a JSON Schema; all problems of one payload are told together, in FastAPI's shape."""

    def __init__(self) -> None:
        self._schema: dict[str, Any] | None = None
        self._validator: Any = None

    def __call__(self, payload: Mapping[str, Any], schema: dict[str, Any] | None) -> None:
        """Check ``payload``; ``schema`` None checks the reserved keys only.

        Raises:
            InvalidPayload: with a detail per problem.
        """
        reserved = [name for name in RESERVED if name in payload]
        if reserved:
            raise details.invalid([_reserved(name) for name in reserved])
        if schema is not self._schema:
            self._compile(schema)
        if self._validator is None:
            return
        try:
            if self._validator.is_valid(payload):
                return
            found = [detail for error in self._validator.iter_errors(payload) for detail in _details(error, schema)]
        except (ValueError, RecursionError) as error:
            raise InvalidPayload(f"the payload cannot be checked: {error}") from error
        raise details.invalid(sorted(found, key=lambda detail: len(detail["loc"]))[:100])

    def _compile(self, schema: dict[str, Any] | None) -> None:
        self._schema, self._validator = schema, None
        if schema is None:
            return
        try:
            self._validator = jsonschema_rs.validator_for(schema, offline=True)
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            # The ranks check every request again, so nothing gets through; only the answer comes later.
            log.warning("the worker's request schema cannot be used (%s); the ranks check the payloads alone", error)


def _reserved(name: str) -> dict[str, Any]:
    cure = "POST to /stream instead" if name == "streaming" else "use another name"
    return details.problem(["body", name], f"This name is reserved; {cure}", "reserved_name")


def _details(error: ValidationError, schema: dict[str, Any] | None) -> list[dict[str, Any]]:
    """FastAPI-shaped details for one error. They never repeat values: a payload may be large, and private."""
    loc: list[str | int] = ["body", *error.instance_path]
    kind: Any = error.kind
    kinds = ValidationErrorKind
    if isinstance(kind, kinds.Required):
        return [details.problem([*loc, kind.property], "Field required", "missing")]
    if isinstance(kind, kinds.AdditionalProperties | kinds.UnevaluatedProperties):
        known = (schema or {}).get("properties", {}) if len(loc) == 1 else {}
        return [{**details.unknown_name(name, known), "loc": [*loc, name]} for name in kind.unexpected]
    if isinstance(kind, kinds.AnyOf | kinds.OneOfNotValid):
        expected = [part for branch in kind.context for inner in branch for part in _expected(inner)]
        text = f"Input should be {' or '.join(dict.fromkeys(expected))}" if expected else "Input fits no alternative"
        return [details.problem(loc, text, "union")]
    return [details.problem(loc, _message(kind), _NAMES.get(kind.name, kind.name))]


def _expected(error: ValidationError) -> list[str]:
    kind: Any = error.kind
    if isinstance(kind, ValidationErrorKind.Type):
        return [_article(name) for name in kind.types]
    if isinstance(kind, ValidationErrorKind.Enum):
        return [_one_of(kind.options)]
    return []


def _message(kind: Any) -> str:
    match kind.name:
        case "type":
            return f"Input should be {' or '.join(map(_article, kind.types))}"
        case "enum":
            return f"Input should be {_one_of(kind.options)}"
        case "const":
            return f"Input should be {kind.expected_value!r}"
        case "minimum":
            return f"Input should be greater than or equal to {kind.limit}"
        case "maximum":
            return f"Input should be less than or equal to {kind.limit}"
        case "exclusiveMinimum":
            return f"Input should be greater than {kind.limit}"
        case "exclusiveMaximum":
            return f"Input should be less than {kind.limit}"
        case "minLength":
            return f"String should have at least {kind.limit} character(s)"
        case "maxLength":
            return f"String should have at most {kind.limit} character(s)"
        case "minItems":
            return f"List should have at least {kind.limit} item(s)"
        case "maxItems":
            return f"List should have at most {kind.limit} item(s)"
        case "pattern":
            return f"String should match pattern '{kind.pattern}'"
        case "multipleOf":
            return f"Input should be a multiple of {kind.multiple_of}"
        case "uniqueItems":
            return "List should not have the same item twice"
        case "format":
            return f"Input should be a valid {kind.format}"
        case name:
            return f"Input does not fit the schema's '{name}'"


_ARTICLES = {"null": "null", "integer": "an integer", "object": "an object", "array": "a list", "boolean": "a boolean"}
#: pydantic's names for the same problems, which FastAPI's clients know.
_NAMES = {
    "minimum": "greater_than_equal",
    "maximum": "less_than_equal",
    "exclusiveMinimum": "greater_than",
    "exclusiveMaximum": "less_than",
    "minLength": "string_too_short",
    "maxLength": "string_too_long",
    "minItems": "too_short",
    "maxItems": "too_long",
    "pattern": "string_pattern_mismatch",
    "multipleOf": "multiple_of",
    "type": "type_error",
    "const": "literal_error",
}


def _article(name: str) -> str:
    return _ARTICLES.get(name, f"a {name}")


def _one_of(options: list[Any]) -> str:
    return "one of " + ", ".join(repr(option) for option in options) if options else "nothing"
