"""``drumline stream``: run one request and follow it live: progress bar, previews as files, then the result."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from drumline.cli import options
from drumline.cli.invoke import show_result
from drumline.cli.output import interactive, note, stderr

if TYPE_CHECKING:
    from drumline.client import Event


def stream(
    target: options.Target,
    values: options.Values = None,
    output: options.Output = Path(),
    name: options.Name = None,
    path: Annotated[str, typer.Option("--path", help="Endpoint of the app.")] = "/stream",
    events: Annotated[
        bool, typer.Option("--events", help="Print every event as a line of JSON; write no files.")
    ] = False,
    namespace: options.Namespace = None,
    context: options.Context = None,
    timeout: options.Timeout = None,
    retries: options.Retries = 0,
    api_key: options.ApiKey = None,
    cacert: options.CaFile = None,
    insecure: options.Insecure = False,
    debug: options.Debug = False,
) -> None:
    """Run one request and follow it: a progress bar, previews as files as they come, then the result.

    Example: drumline stream localhost:8080 prompt='a lighthouse' --output out
    In a cluster: drumline stream sdxl --namespace art prompt='a lighthouse'
    """
    from drumline.cli.target import Connection, client_for
    from drumline.cli.values import parse

    payload = parse(values or [])
    request_id = secrets.token_hex(16)
    prefix = name or f"result-{request_id[:8]}"
    result: Any = None
    connection = Connection(namespace, context, api_key, timeout, retries, cacert, insecure)
    with (
        client_for(target, connection) as client,
        client.stream(payload, path, request_id=request_id) as received,
    ):
        if events:
            for event in received:
                line = {"event": event.type, "id": event.id, "data": event.data}
                typer.echo(json.dumps(line, separators=(",", ":")))
            return
        with _watcher() as watcher:
            for event in received:
                if event.type == "update":
                    _update(event, watcher, output, prefix)
                else:
                    result = event.data
    show_result(result, output, prefix)


def _update(event: Event, watcher: Watcher, folder: Path, prefix: str) -> None:
    from drumline.media import save_images

    progress = event.data.get("progress") if isinstance(event.data, dict) else None
    if isinstance(progress, dict) and isinstance(progress.get("done"), int | float):
        watcher.progress(progress)
        return
    rest, files = save_images(event.data, folder, f"{prefix}-preview-{event.id}")
    for file in files:
        note(f"preview {file}")
    if not files:
        note(json.dumps(rest, ensure_ascii=(sys.stderr.encoding or "").lower() != "utf-8"))


class Watcher(Protocol):
    """Shows progress."""

    def progress(self, progress: dict[str, Any]) -> None:
        """Show ``{"done", "total", ...}``."""


class _Quiet:
    """Nobody watches."""

    def progress(self, progress: dict[str, Any]) -> None:
        """Show nothing."""


class _Bar:
    """A progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("waiting", total=None, metrics="")

    def progress(self, progress: dict[str, Any]) -> None:
        """Show how far the request is, and its metrics."""
        total = progress.get("total")
        metrics = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in progress.items()
            if name not in {"done", "total"} and isinstance(value, str | int | float)
        )
        self._bar.update(
            self._task,
            description="running",
            completed=progress["done"],
            total=total if isinstance(total, int | float) else None,
            metrics=metrics,
        )


@contextlib.contextmanager
def _watcher() -> Iterator[Watcher]:
    if not interactive():
        yield _Quiet()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[metrics]}"), console=stderr(), transient=True) as bar:
        yield _Bar(bar)
