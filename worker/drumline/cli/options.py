"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.output import State


class LogFormat(StrEnum):
    """How logs look."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The lowest level shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Device(StrEnum):
    """Where ranks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Backend(StrEnum):
    """How ranks talk to each other."""

    AUTO = "auto"
    NCCL = "nccl"
    GLOO = "gloo"


def _set_debug(debug: bool) -> bool:
    State.debug = debug
    return debug


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show tracebacks and debug logs.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="DRUM_API_KEY", show_envvar=True, help="Key to send, if the app wants one."),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="URL of the app, e.g. localhost:8080; or NAME or NAMESPACE/NAME of a DistributedApp in a cluster.",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="Of the DistributedApp; default: the context's own."),
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Of the kubeconfig; default: the current one.")
]
Values = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[JSON | KEY=VALUE | @FILE]...",
        help="The request: a JSON object, KEY=VALUE pairs (a value is JSON, else text; KEY=@FILE is a file's content), "
        "@FILE with a JSON object, or - for one on standard input. Later ones win.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", file_okay=False, help="Folder for images and other files.")
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Names of those files begin so; default: by request.")
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Give up, and cancel, after this long.")
]
Retries = Annotated[
    int, typer.Option("--retries", min=0, max=100, help="Try again when the app is away, busy or not ready.")
]
CaFile = Annotated[
    Path | None,
    typer.Option("--cacert", metavar="FILE", help="PEM file of the authority that signed the server's certificate."),
]
Insecure = Annotated[bool, typer.Option("--insecure", "-k", help="Accept any certificate.")]
