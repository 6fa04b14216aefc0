"""``drumline plan``: which way to use N GPUs fits a model, what it costs, and which one to take."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from drumline.cli import options
from drumline.cli.doctor import Format
from drumline.cli.output import stdout
from drumline.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


class Goal(StrEnum):
    """What the recommended plan is best at."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Link(StrEnum):
    """What connects the GPUs."""

    NVLINK = "nvlink"
    PCIE = "pcie"
    ETHERNET = "ethernet"


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of a known model, or a folder or file with its config.json.")
    ],
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=1024, help="How many GPUs.")],
    memory: Annotated[str, typer.Option("--memory", help="Memory of each GPU, e.g. 80Gi.")] = "80Gi",
    train: Annotated[bool, typer.Option("--train", help="Plan training of all weights instead of inference.")] = False,
    goal: Annotated[Goal, typer.Option("--goal", help="What to choose by.")] = Goal.LATENCY,
    link: Annotated[Link, typer.Option("--link", help="What connects the GPUs.")] = Link.NVLINK,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts, or samples per training step.")] = 8,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of each text or sample.")] = 4096,
    width: Annotated[int, typer.Option("--width", min=64, help="Of an image, in pixels.")] = 1024,
    height: Annotated[int, typer.Option("--height", min=64, help="Of an image, in pixels.")] = 1024,
    output: Annotated[Format, typer.Option("--output", "-o", help="For people, or JSON for programs.")] = Format.TEXT,
    debug: options.Debug = False,
) -> None:
    """Compute which plans fit N GPUs: memory per rank, bytes on the wire per step, and the recommended one.

    From the model's configuration alone: no weights, no GPU. Times are estimates to compare plans by.
    """
    from drumline.planning.advice import advise
    from drumline.planning.option import Machine
    from drumline.planning.workload import Workload, plans_for

    machine = Machine(gpus, parse_memory(memory), link.value)
    found, refused = plans_for(model, machine, Workload(train, batch, length, width, height))
    advice = advise(found, machine, goal.value)
    found.sort(key=lambda option: (not option.fits(machine), option.seconds(machine)))
    if output is Format.JSON:
        rows = [
            {
                **asdict(option),
                "memory": option.memory,
                "fits": option.fits(machine),
                "seconds": option.seconds(machine),
            }
            for option in found
        ]
        best = advice.best.plan if advice.best else None
        typer.echo(json.dumps({"recommended": best, "why": advice.why, "plans": rows, "refused": refused}, indent=2))
        return
    _print(found, advice, machine, refused)


def parse_memory(text: str) -> int:
    """Return the bytes that a Kubernetes quantity such as ``80Gi`` or ``24G`` stands for.

    Raises:
        ConfigurationError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]i?)?b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigurationError(f"--memory: {text!r} is no amount of memory; write e.g. 80Gi")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _print(found: list[Any], advice: Any, machine: Any, refused: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from drumline.planning.advice import gib

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("plan", no_wrap=True)
    for column in ("per rank", "weights", "state", "cache", "activations", "wire per step", "step"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for option in found:
        fits = option.fits(machine)
        notes = ["recommended"] if option is advice.best else []
        notes += [] if fits else ["does not fit"]
        notes += [] if option.exact else ["approximate"]
        parts = (option.memory, option.weights, option.state, option.cache, option.activations, option.wire)
        table.add_row(
            option.plan,
            *(gib(part) if part else "-" for part in parts),
            f"{option.seconds(machine) * 1000:.1f} ms",
            ", ".join(notes),
            style=None if fits else "dim",
        )
    console = stdout()
    console.print(table)
    console.print(
        Text.assemble(("\nrecommended: ", "bold"), advice.best.plan if advice.best else "none", "\n", advice.why)
    )
    for reason in refused:
        console.print(Text.assemble(("not possible: ", "bold"), reason))
