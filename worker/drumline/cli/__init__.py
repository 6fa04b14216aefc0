"""The ``drumline`` command. One file per subcommand; nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from drumline.cli.doctor import doctor as _doctor
from drumline.cli.invoke import invoke as _invoke
from drumline.cli.output import Group
from drumline.cli.plan import plan as _plan
from drumline.cli.run import run as _run
from drumline.cli.serve import serve as _serve
from drumline.cli.stream import stream as _stream

app = typer.Typer(
    name="drumline",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="N ranks, one beat: run one multi-GPU worker class behind invoke and stream endpoints.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use.",
)
app.command("run")(_run)
app.command("serve")(_serve)
app.command("invoke")(_invoke)
app.command("stream")(_stream)
app.command("plan")(_plan)
app.command("doctor")(_doctor)


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"drumline {metadata.version('drumline')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """N ranks, one beat: run one multi-GPU worker class behind invoke and stream endpoints."""


def main() -> None:
    """Parse the command line and do what it says."""
    app()
