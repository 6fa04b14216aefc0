"""What the commands share on the terminal: consoles, errors with the next command to try, exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from drumline.errors import (
    ConfigurationError,
    ConnectionFailed,
    DrumlineError,
    InvalidPayload,
    NotReady,
    QueueFull,
    RankHung,
    RankLost,
    RequestTimeout,
    SetupFailed,
    WorkerError,
)

FAILED = 1
WRONG_USE = 2


class State:
    """What the options of the command in hand say about output."""

    debug = False
    command = ""
    #: The command that an error message should name instead of the general one.
    hint = ""


def stdout() -> Console:
    """Return a console on what ``sys.stdout`` is now."""
    return Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)


def stderr() -> Console:
    """Return a console on what ``sys.stderr`` is now."""
    return Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)


def interactive() -> bool:
    """Whether somebody watches: progress bars are for a terminal only."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """Tell something that is not the command's result."""
    stderr().print(Text(text))


class Group(TyperGroup):
    """The ``drumline`` command: turns our errors into one clear line, the command to try next, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        State.debug, State.hint = False, ""
        try:
            return super().invoke(ctx)
        except DrumlineError as error:
            State.command = ctx.invoked_subcommand or ""
            raise typer.Exit(report(error)) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:
            raise  # whoever read our output left; the framework closes quietly
        except OSError as error:
            if State.debug:
                traceback.print_exc()
            where = f"{error.filename}: " if error.filename else ""
            _print_error(f"{where}{error.strerror or error}", "")
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            # Not one of ours: a bug, of drumline or of an App's code in this process.
            raise typer.Exit(report(error)) from None


def report(error: BaseException) -> int:
    """Print ``error`` and what to try; return the exit code."""
    if State.debug:
        traceback.print_exception(error)
        remote = getattr(error, "remote_traceback", "")
        if remote:
            note(remote.rstrip())
    text = str(error)
    if not isinstance(error, DrumlineError):
        text = f"{type(error).__name__}: {text}"
    elif error.request_id:
        text += f" (request {error.request_id})"
    _print_error(text, State.hint or _hint(error))
    return WRONG_USE if isinstance(error, ConfigurationError) else FAILED


def _print_error(text: str, hint: str) -> None:
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), text))
    if hint:
        console.print(Text.assemble(("try:   ", "bold"), hint))


def _hint(error: BaseException) -> str:
    if isinstance(error, ConfigurationError):
        if "key" in str(error).lower():
            return "--api-key KEY, or set DRUM_API_KEY"
        return f"drumline {State.command} --help"
    if isinstance(error, ConnectionFailed):
        return "drumline run TARGET, if it is not running; or check the URL"
    if isinstance(error, QueueFull | NotReady):
        return "again in a moment, or with --retries 5"
    if isinstance(error, RequestTimeout):
        return "a longer --timeout"
    if isinstance(error, InvalidPayload):
        return "the server's /docs, which shows what a request may hold"
    if isinstance(error, WorkerError):
        return f"the server's log: the traceback is in the lines of rank {error.rank}"
    if isinstance(error, RankLost | RankHung):
        return "the server's /status, which shows the last failure"
    if isinstance(error, SetupFailed):
        return "drumline doctor, and the lines of that rank above"
    return "" if State.debug else "the same with --debug, which shows where"
