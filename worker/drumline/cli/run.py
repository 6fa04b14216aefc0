"""``drumline run``: the whole app on this machine: ranks, runner, HTTP server."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drumline.cli import options
from drumline.cli.output import note, report

if TYPE_CHECKING:
    from drumline.contract import RunnerSettings
    from drumline.targets import LaunchPlan

_RANKS, _SERVER, _LIMITS, _OUTPUT = "Ranks", "Server", "Limits", "Output"

#: On one machine nobody balances load, and whoever presses Ctrl-C is waiting.
_LOCAL = {"any_id": True, "drain_delay": 0.0, "drain_timeout": 30.0}


def run(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="path.py, path.py:Class, module:Class, or a manifest such as app.yaml."),
    ],
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", "-n", min=1, max=1024, help="Number of ranks.", rich_help_panel=_RANKS),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=JSON | @FILE", help="Argument of setup(); repeat it for more.", rich_help_panel=_RANKS
        ),
    ] = None,
    device: Annotated[
        options.Device | None,
        typer.Option(help="Where ranks run; auto: cuda if there is a GPU per rank.", rich_help_panel=_RANKS),
    ] = None,
    backend: Annotated[
        options.Backend | None,
        typer.Option(help="How ranks talk; auto: nccl on GPUs, gloo on the CPU.", rich_help_panel=_RANKS),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start the ranks anew when a file beside TARGET changes.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", min=0, max=65535, help="0: a free one.", rich_help_panel=_SERVER)
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file; serves https.", rich_help_panel=_SERVER, dir_okay=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file of its key.", rich_help_panel=_SERVER, dir_okay=False)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Ask clients for this key; repeat it for more.", rich_help_panel=_SERVER),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, help="Longest run of a request.", rich_help_panel=_LIMITS),
    ] = None,
    hang_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, help="A rank silent for so long hangs.", rich_help_panel=_LIMITS),
    ] = None,
    max_queue_depth: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait.", rich_help_panel=_LIMITS)
    ] = None,
    log_format: Annotated[
        options.LogFormat | None,
        typer.Option(help="auto: text on a terminal, else JSON.", rich_help_panel=_OUTPUT),
    ] = None,
    log_level: Annotated[
        options.LogLevel | None, typer.Option(help="Lowest level shown.", rich_help_panel=_OUTPUT)
    ] = None,
    debug: options.Debug = False,
    inherit: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run an app on this machine: its ranks and an HTTP server.

    TARGET is a file (its only App, else its only worker class), a class in it, or the manifest that `kubectl apply`
    takes. Options win over DRUMLINE_* variables, and those over the manifest.

    Example: drumline run app.py -n 2 --setup model=tiny
    """
    from drumline import logs
    from drumline.cli.values import parse

    given: dict[str, Any] = {
        "world_size": world_size,
        "setup_args": parse(setup, "--setup") if setup else None,
        "device": device,
        "backend": backend,
        "host": host,
        "port": port,
        "tls_cert": str(tls_cert) if tls_cert else None,
        "tls_key": str(tls_key) if tls_key else None,
        "api_keys": tuple(api_key) if api_key else None,
        "request_timeout": request_timeout,
        "hang_timeout": hang_timeout,
        "max_queue_depth": max_queue_depth,
        "log_format": log_format,
        "log_level": log_level or ("debug" if debug else None),
        "debug": debug or None,
    }
    if reload:
        from drumline.cli.reload import keep_running

        raise typer.Exit(keep_running(target, lambda: _plan(target, given).settings))
    plan = _plan(target, given)
    for text in plan.notes:
        note(f"note: {text}")
    for name, value in plan.env.items():
        os.environ.setdefault(name, value)
    logs.configure(plan.settings.log_format, plan.settings.log_level)
    raise typer.Exit(_serve(plan.settings, inherit))


def _plan(target: str, given: dict[str, Any]) -> LaunchPlan:
    """Options over environment over manifest over what suits one machine."""
    from drumline import targets
    from drumline.contract import ENV_PREFIX, RunnerSettings

    names = {ENV_PREFIX + field.upper() for field in RunnerSettings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in names)
    if unknown:
        note(f"note: no such setting: {', '.join(unknown)}")
    here = RunnerSettings.from_env({name: value for name, value in os.environ.items() if name in names})
    environment = {field: getattr(here, field) for field in here.model_fields_set - {"target"}}
    options = {name: value for name, value in given.items() if value is not None}
    arguments = options.pop("setup_args", {})
    plan = targets.launch_plan(target, **{**_LOCAL, **environment, **options})
    if arguments:  # those of the manifest or the environment stay, but for the ones that are given here
        values = plan.settings.model_dump(exclude_unset=True)
        values["setup_args"] = {**plan.settings.setup_args, **arguments}
        plan = replace(plan, settings=RunnerSettings.checked(values))
    return plan


def _serve(settings: RunnerSettings, inherit: str | None) -> int:
    from drumline import host

    service = host.build_service(settings, early=True)
    from drumline.cli.ready import Loading
    from drumline.cli.reload import inherited
    from drumline.logs import shows_text
    from drumline.server.serve import run as run_server

    loading = Loading(service, settings, shows_text(settings.log_format))
    with inherited(inherit) as handed, loading.shown():
        ended = run_server(service, on_bound=loading.bound, on_ready=loading.ready, **handed)
    if ended.error is None:
        return 0
    return report(host.failure_of(ended.error))
