"""``drumline serve``: what a container runs. Settings from the environment, JSON logs, a reason when it ends."""

from __future__ import annotations

import os

import typer

from drumline.cli import options
from drumline.cli.output import FAILED, WRONG_USE, State, report


def serve(debug: options.Debug = False) -> None:
    """Serve the app that the DRUMLINE_* variables describe, as a container does.

    All settings come from the environment; `drumline run` takes options. Exits 1 when the ranks cannot start or their
    restart budget is used up, and leaves the reason in the termination log.
    """
    from drumline import host, logs
    from drumline.contract import RunnerSettings
    from drumline.errors import ConfigurationError, DrumlineError

    termination_log = os.environ.get("DRUMLINE_TERMINATION_LOG") or RunnerSettings().termination_log
    State.hint = "drumline doctor; docs/reference/settings.md has all variables"
    error: BaseException | None
    try:
        settings = RunnerSettings.from_env(os.environ)
        logs.configure(settings.log_format, "debug" if debug else settings.log_level)
        settings = host.fit_to_gpus(settings)
        service = host.build_service(settings, early=True)
        from drumline.cli.ready import Loading
        from drumline.server.serve import run

        loading = Loading(service, settings, for_people=False)
        error = run(service, on_bound=loading.bound, on_ready=loading.ready).error
    except DrumlineError as wrong:
        error = wrong
    if error is None:
        return
    error = host.failure_of(error)
    host.write_termination_log(error, termination_log)
    report(error)
    raise typer.Exit(WRONG_USE if isinstance(error, ConfigurationError) else FAILED)
