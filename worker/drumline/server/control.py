"""Health, status, metrics, cancel, OpenAPI and docs; and how FastAPI's errors become problems."""

from __future__ import annotations

import http
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from drumline import problems
from drumline.errors import DrumlineError
from drumline.problems import Problem, ProblemError
from drumline.server import docs
from drumline.server.body import check_media_type
from drumline.server.edge import RefusedError
from drumline.server.exchange import SCOPE_KEY, Exchange
from drumline.server.metrics import CONTENT_TYPE, Metrics
from drumline.server.service import Service

log = logging.getLogger("drumline.server")

#: Longest wait of ``GET /status?since=`` and ``GET /readyz?since=``, in seconds.
STATUS_WAIT = 30.0
Since = Annotated[
    int | None,
    Query(ge=0, le=1 << 53, description="a `version` seen before: wait up to 30 s until the status has another"),
]
_SUFFIXES = {
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "payload-too-large",
}


def control_router(service: Service, metrics: Metrics, openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """Return the routes that every app has."""
    router = APIRouter()
    board = service.board

    def status(code: int) -> Response:
        return _json(board.status(), code)

    @router.get("/healthz", summary="Whether the process lives")
    async def healthz() -> Response:
        return _json({"status": "ok"})

    async def readyz(since: Since = None) -> Response:
        if since is not None:
            await board.wait(since, STATUS_WAIT)
        return status(200 if board.ready else 503)

    for path in ("/startupz", "/readyz"):
        responses: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready; the body is the status"}}
        router.add_api_route(
            path,
            readyz,
            name=path.strip("/"),
            summary="Whether every rank is ready and requests should be sent here",
            responses=responses,
        )

    @router.get("/status", summary="State of the group and its ranks")
    async def get_status(since: Since = None) -> Response:
        if since is not None:
            await board.wait(since, STATUS_WAIT)
        return status(200)

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
    async def get_metrics() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    @router.post("/requests/{request_id}/cancel", status_code=202, summary="Cancel a waiting or running request")
    async def cancel(request_id: str) -> Response:
        # Every runner is asked: an App's endpoint may have requests of this id at several of them.
        found = [runner.cancel(request_id) for runner in service.runners()]
        if not any(found):
            raise ProblemError(problems.make("not-found", "No request with this id waits or runs here."))
        return _json({"request_id": request_id, "status": "cancelling"}, 202)

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        return _json(openapi())

    @router.get("/docs", include_in_schema=False)
    async def docs_page() -> Response:
        return Response(docs.page(service.title), media_type="text/html", headers=docs.HEADERS)

    return router


def add_handlers(app: FastAPI, debug: bool) -> None:
    """Make every error of ``app`` a problem.

    Args:
        app: gets the exception handlers.
        debug: show tracebacks and the text of unknown exceptions to clients.
    """

    async def known(request: Request, error: Exception) -> Response:
        exchange = _exchange(request)
        return _answer(exchange, error, problems.from_error(error, exchange.request_id, debug))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        exchange = _exchange(request)
        return _answer(exchange, error, _invalid(exchange, error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        exchange = _exchange(request)
        problem = error.problem if isinstance(error, RefusedError) else _http_problem(exchange, error)
        return _answer(exchange, error, problem)

    async def unknown(request: Request, error: Exception) -> Response:
        exchange = _exchange(request)
        log.error("a request failed", exc_info=error, extra={"request_id": exchange.request_id})
        return _answer(exchange, error, problems.from_error(error, exchange.request_id, debug))

    app.add_exception_handler(DrumlineError, known)
    app.add_exception_handler(ProblemError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unknown)


def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.scope[SCOPE_KEY]
    return exchange


def _answer(exchange: Exchange, error: BaseException, problem: Problem) -> Response:
    problem = exchange.named(problem)
    exchange.outcome = problem.suffix
    exchange.failure = error
    return Response(problem.body(), problem.status, headers=dict(problem.headers()))


def _invalid(exchange: Exchange, error: RequestValidationError) -> Problem:
    found = error.errors()
    if any(item.get("type") == "json_invalid" for item in found):
        reason = next(item.get("ctx", {}).get("error", "") for item in found if item.get("type") == "json_invalid")
        return problems.make("invalid-json", f"The body is not valid JSON: {reason}.", exchange.request_id)
    if isinstance(error.body, bytes):
        # FastAPI left the body unread because its content type is not JSON; say so instead of "not an object".
        try:
            check_media_type(exchange, strict=True)
        except ProblemError as wrong:
            return wrong.problem
    return problems.validation([_plain(item) for item in found], exchange.request_id)


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """FastAPI's detail without ``input``: a payload may be large, and private."""
    return {"loc": list(item.get("loc", ())), "msg": item.get("msg", ""), "type": item.get("type", "value_error")}


def _http_problem(exchange: Exchange, error: HTTPException) -> Problem:
    status = error.status_code
    suffix = _SUFFIXES.get(status, "http-error")
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = f"Status {status}"
    detail: Any = error.detail
    if status == 404 and detail == "Not Found":
        detail = f"Nothing is served at {exchange.method} {exchange.path[:200]}."
    elif status == 405 and detail == "Method Not Allowed":
        detail = f"{exchange.method} {exchange.path[:200]} is not served; use {(error.headers or {}).get('allow', '')}."
    title = problems.CATALOGUE[suffix][1] if suffix in problems.CATALOGUE else phrase
    headers = tuple((error.headers or {}).items())
    return Problem(suffix, status, title, detail, exchange.request_id, extra_headers=headers)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
