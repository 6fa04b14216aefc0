"""``drumline doctor``: what this machine can do, each problem with its cure."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from typing import Annotated

import typer

from drumline.cli import options
from drumline.cli.output import FAILED, stdout


class Format(StrEnum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"


_MARKS = {"ok": ("ok", "green"), "info": ("-", "dim"), "warning": ("warn", "yellow"), "problem": ("FAIL", "bold red")}


def doctor(
    output: Annotated[Format, typer.Option("--output", "-o", help="For people, or JSON for programs.")] = Format.TEXT,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port that a server would take.")] = 8080,
    cluster: Annotated[bool, typer.Option("--cluster/--no-cluster", help="Also look for a Kubernetes cluster.")] = True,
    debug: options.Debug = False,
) -> None:
    """Look at GPUs, torch, shared memory, ports and the cluster; name the cure of each problem.

    Exits 1 when something that drumline needs does not work.
    """
    from rich.text import Text

    from drumline.doctor import examine

    findings = []
    console = stdout()
    for finding in examine(port, cluster):
        findings.append(finding)
        if output is Format.TEXT:
            mark, style = _MARKS[finding.status]
            console.print(Text.assemble((f"{mark:5}", style), (f"{finding.name:22}", "bold"), finding.detail))
            if finding.cure and finding.status != "ok":
                console.print(Text.assemble(" " * 27, ("try: ", "bold"), finding.cure))
    counts = Counter(finding.status for finding in findings)
    if output is Format.JSON:
        typer.echo(
            json.dumps({"ok": not counts["problem"], "findings": [each.to_dict() for each in findings]}, indent=2)
        )
    else:
        console.print(f"{counts['problem']} problems, {counts['warning']} warnings")
    if counts["problem"]:
        raise typer.Exit(FAILED)
