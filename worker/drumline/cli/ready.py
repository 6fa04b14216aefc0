"""What ``drumline run`` shows while ranks load, and when they are ready: addresses, and a line to paste for each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.text import Text

from drumline.cli.output import interactive, stderr, stdout
from drumline.contract import RunnerSettings

if TYPE_CHECKING:
    from drumline.server.service import Service

log = logging.getLogger("drumline")


class Loading:
    """The time between the bound socket and the ready group: a progress bar, or log lines where nobody watches."""

    def __init__(self, service: Service, settings: RunnerSettings, for_people: bool) -> None:
        self._service = service
        self._settings = settings
        self._for_people = for_people
        self._began = time.monotonic()
        self._following: asyncio.Task[None] | None = None
        self._bar: Any = None
        self._url = ""

    def bound(self, url: str) -> None:
        """The server listens; ranks begin to load. Called on the event loop."""
        self._url = url
        log.info("listening on %s; the ranks are loading", url, extra={"fields": {"url": url}})
        if self._for_people and interactive():
            self._following = asyncio.get_running_loop().create_task(self._follow())

    def ready(self) -> None:
        """All ranks are up."""
        self._end_bar()
        seconds = time.monotonic() - self._began
        status = self._service.board.status()
        ranks = status["ranks"]
        devices = ", ".join(sorted({rank["device"] for rank in ranks if rank["device"]}))
        count = f"{len(ranks)} rank{'' if len(ranks) == 1 else 's'}"
        what = f"{count} on {devices}" if ranks else "no ranks"  # an App need not have any
        if not self._for_people:
            fields = {"url": self._url, "ranks": len(ranks), "seconds": round(seconds, 2)}
            log.info("ready: %s at %s", what, self._url, extra={"fields": fields})
            return
        title = Text.assemble((self._settings.name, "bold"), f" is ready: {what}, {seconds:.1f} s")
        console = stdout()
        console.print(title)
        for label, line in hints(self._service, self._settings, self._url):
            console.print(Text.assemble(("  " + label.ljust(8), "dim"), line))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Leave no half-drawn bar behind, however the start ends."""
        try:
            yield
        finally:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    async def _follow(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = bar = Progress(*columns, console=stderr(), transient=True)
        bar.start()
        task = bar.add_task("importing", total=None)
        board = self._service.board
        while True:
            status = board.status()
            ranks = status["ranks"]
            if any(rank["pid"] for rank in ranks):
                words = f"{status['readyRanks']} of {len(ranks)} ranks ready"
                bar.update(task, description=words, total=len(ranks), completed=status["readyRanks"])
            await board.wait(board.version, 3600.0)


def hints(service: Service, settings: RunnerSettings, url: str) -> Iterator[tuple[str, str]]:
    """Yield what to do with the app: a label, and an address or a command."""
    yield "url", url
    head = ["curl"]
    if settings.tls_cert is not None:
        head += ["--cacert", settings.tls_cert]
    if settings.api_keys:
        head += ["-H", "Authorization: Key YOUR-KEY"]
    if service.runner is not None:
        body = _text(sample(service.runner.request_schema or {}))
        yield "invoke", shlex.join([*head, f"{url}/", "-d", body])
        yield "stream", shlex.join([*head, "-N", f"{url}/stream", "-d", body])
    else:
        for path, schema in _endpoints(service):
            yield (
                "POST",
                shlex.join([*head, *(["-N"] if "stream" in path else []), url + path, "-d", _text(sample(schema))]),
            )
    yield "docs", f"{url}/docs"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _endpoints(service: Service) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for route in service.router.routes if service.router is not None else ():
        field = getattr(route, "body_field", None)
        model = getattr(getattr(field, "field_info", None), "annotation", None)
        schema = model.model_json_schema() if isinstance(model, type) and issubclass(model, BaseModel) else {}
        yield getattr(route, "path", "/"), schema


def sample(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a small request that fits a JSON Schema: what is required, else the first member that it has."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = [name for name in schema.get("required", []) if name in properties]
    return {name: _example(properties[name], schema) for name in required or list(properties)[:1]}


def _example(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 4) -> Any:
    if "$ref" in schema and depth:
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(part, {})
        return _example(target, root, depth - 1)
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    for key in ("const", "default"):
        if schema.get(key) is not None:
            return schema[key]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key) and depth:
            return _example(schema[key][0], root, depth - 1)
    match schema.get("type"):
        case "string":
            return "..."
        case "integer" | "number":
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema))
            return max(1, least) if schema.get("maximum", 1) >= 1 else least
        case "boolean":
            return True
        case "array":
            return []
        case "object" if depth:
            return {
                name: _example(schema["properties"][name], root, depth - 1)
                for name in schema.get("required", [])
                if name in schema.get("properties", {})
            }
    return {}
