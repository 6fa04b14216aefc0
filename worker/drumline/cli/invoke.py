"""``drumline invoke``: run one request, files to a folder, the rest to standard output."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.cli import options
from drumline.cli.output import interactive, note, stderr, stdout


def invoke(
    target: options.Target,
    values: options.Values = None,
    output: options.Output = Path(),
    name: options.Name = None,
    path: Annotated[str, typer.Option("--path", help="Endpoint of the app.")] = "/",
    namespace: options.Namespace = None,
    context: options.Context = None,
    timeout: options.Timeout = None,
    retries: options.Retries = 0,
    api_key: options.ApiKey = None,
    cacert: options.CaFile = None,
    insecure: options.Insecure = False,
    debug: options.Debug = False,
) -> None:
    """Run one request. Images in the result become files; the rest is printed as JSON.

    Example: drumline invoke localhost:8080 prompt='a lighthouse' num_inference_steps=4 --output out
    In a cluster: drumline invoke sdxl --namespace art prompt='a lighthouse'
    """
    from drumline.cli.target import Connection, client_for
    from drumline.cli.values import parse

    payload = parse(values or [])
    request_id = secrets.token_hex(16)
    connection = Connection(namespace, context, api_key, timeout, retries, cacert, insecure)
    with client_for(target, connection) as client:
        if interactive():
            with stderr().status(f"waiting for {target}"):
                result = client.invoke(payload, path, request_id=request_id)
        else:
            result = client.invoke(payload, path, request_id=request_id)
    show_result(result, output, name or f"result-{request_id[:8]}")


def show_result(result: Any, folder: Path, name: str) -> None:
    """Write the files of a result, name them on standard error, print the rest on standard output."""
    from drumline.media import save_images

    rest, files = save_images(result, folder, name)
    for file in files:
        note(f"saved {file}")
    text = json.dumps(rest, indent=2, ensure_ascii=not _takes_unicode())
    console = stdout()
    if console.is_terminal:
        console.print_json(text, indent=2)
    else:
        typer.echo(text)


def _takes_unicode() -> bool:
    import sys

    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
