"""The OpenAPI document: FastAPI's own routes plus the two hot ones, which FastAPI does not know."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from drumline import problems
from drumline.server.calls import QUEUE_TIMEOUT_HEADER, RUN_TIMEOUT_HEADER
from drumline.server.service import Service

_CALL_PROBLEMS = (400, 401, 404, 408, 413, 415, 422, 429, 431, 499, 500, 503, 504)
_CONTROL_PROBLEMS = (401, 404, 405, 422, 500)


def document(app: FastAPI, service: Service, version: str) -> dict[str, Any]:
    """Return the OpenAPI document as of now; a worker's request schema may be known only after a while."""
    built = get_openapi(
        title=service.title, version=version, description=service.description or _ABOUT, routes=app.routes
    )
    paths = built.setdefault("paths", {})
    schemas = built.setdefault("components", {}).setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Problem"] = _PROBLEM
    for methods in paths.values():
        for operation in methods.values():
            answers = operation.setdefault("responses", {})
            answers.pop("422", None)
            for status in _CONTROL_PROBLEMS:
                answers.setdefault(str(status), _problem_response(status))
    if service.runner is not None:
        schemas["Payload"] = _payload(service.runner.request_schema, schemas)
        paths |= _call_paths(service.settings.app_id)
    else:
        routes = service.router.routes if service.router is not None else []
        _add_call_problems(paths, {getattr(route, "path", "") for route in routes})
    if service.settings.api_keys:
        schemes = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        built["components"]["securitySchemes"] = schemes
        built["security"] = [{name: []} for name in schemes]
    return built


def _add_call_problems(paths: dict[str, Any], own: Iterable[str]) -> None:
    for path in own:
        for operation in paths.get(path, {}).values():
            for status in _CALL_PROBLEMS:
                operation["responses"].setdefault(str(status), _problem_response(status))


def _call_paths(app_id: str) -> dict[str, Any]:
    invoke = _operation(
        "invoke",
        "Run one request",
        {
            "description": "The result: what rank 0 returned. Images are objects with a data URI in `url`.",
            "content": {"application/json": {"schema": {}}},
        },
    )
    events = (
        "Events `update` in order, then one `result` or `error`; `: ping` in silence. Each `data` is one line of JSON."
    )
    stream = _operation(
        "stream",
        "Run one request and stream its updates",
        {"description": events, "content": {"text/event-stream": {"itemSchema": _EVENT}}},
    )
    paths = {"/": {"post": invoke}, "/stream": {"post": stream}}
    for suffix, operation in (("", invoke), ("/stream", stream)):
        by_id = copy.deepcopy(operation)
        by_id["operationId"] += "_by_id"
        by_id["summary"] += " (under the app's id)"
        namespace, name = app_id.split("/", 1)
        by_id["parameters"] = [
            *by_id["parameters"],
            *(
                {"name": part, "in": "path", "required": True, "schema": {"type": "string", "enum": [value]}}
                for part, value in (("namespace", namespace), ("name", name))
            ),
        ]
        paths[f"/{{namespace}}/{{name}}{suffix}"] = {"post": by_id}
    return paths


def _operation(name: str, summary: str, success: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": _PARAMETERS,
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Payload"}}},
        },
        "responses": {"200": {**success, "headers": _REQUEST_ID}}
        | {str(status): _problem_response(status) for status in _CALL_PROBLEMS},
    }


def _problem_response(status: int) -> dict[str, Any]:
    suffixes = [suffix for suffix, (code, _) in problems.CATALOGUE.items() if code == status]
    headers = dict(_REQUEST_ID)
    if status in (429, 503):
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "seconds"}
    return {
        "description": ", ".join(f"`{suffix}`" for suffix in suffixes),
        "headers": headers,
        "content": {problems.CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _payload(schema: dict[str, Any] | None, schemas: dict[str, Any]) -> dict[str, Any]:
    """The worker's request schema, with its shared types moved to where an OpenAPI document has them."""
    if schema is None:
        return {"type": "object", "description": "Not known yet: the worker's module is still being imported."}
    payload: dict[str, Any] = copy.deepcopy(schema)
    names = {}
    for name, shared in payload.pop("$defs", {}).items():
        names[name] = name if name not in schemas and name != "Payload" else f"Payload_{name}"
        schemas[names[name]] = shared
    for part in (payload, *(schemas[name] for name in names.values())):
        _repoint(part, names)
    return payload


def _repoint(node: Any, names: dict[str, str]) -> None:
    if isinstance(node, list):
        for item in node:
            _repoint(item, names)
    elif isinstance(node, dict):
        ref = node.get("$ref")
        if isinstance(ref, str) and ref.startswith("#/$defs/"):
            node["$ref"] = f"#/components/schemas/{names.get(ref.removeprefix('#/$defs/'), '')}"
        discriminator = node.get("discriminator")
        if isinstance(discriminator, dict) and isinstance(discriminator.get("mapping"), dict):
            discriminator["mapping"] = {
                key: f"#/components/schemas/{names.get(str(value).removeprefix('#/$defs/'), '')}"
                for key, value in discriminator["mapping"].items()
            }
        for item in node.values():
            _repoint(item, names)


_ABOUT = "Invoke with `POST /`, stream with `POST /stream`. Errors are `application/problem+json` with a stable `type`."
#: As FastAPI describes its own event streams: one item is one event.
_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["update", "result", "error"]},
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_REQUEST_ID: dict[str, Any] = {"X-Request-Id": {"schema": {"type": "string"}}}
_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Names this request; made when absent or not 1 to 128 of `A-Za-z0-9._-`.",
        "schema": {"type": "string"},
    },
    *(
        {"name": name.title(), "in": "header", "description": text, "schema": {"type": "number", "exclusiveMinimum": 0}}
        for name, text in (
            (RUN_TIMEOUT_HEADER, "Seconds until the answer; the server has an upper bound."),
            (QUEUE_TIMEOUT_HEADER, "Seconds until the request must have begun; the server has an upper bound."),
        )
    ),
]
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457 problem details.",
    "required": ["type", "title", "status", "detail", "request_id", "error"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {
            "description": "A text; for a validation-error one object per problem.",
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["loc", "msg", "type"],
                        "properties": {
                            "loc": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                            "msg": {"type": "string"},
                            "type": {"type": "string"},
                        },
                    },
                },
            ],
        },
        "request_id": {"type": "string"},
        "error": {"type": "string", "description": "What happened, as one text."},
        "rank": {"type": "integer"},
        "exception_type": {"type": "string"},
        "exit_code": {"type": "integer"},
        "signal": {"type": "integer"},
        "step": {"type": "integer"},
    },
}
