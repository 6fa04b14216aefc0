"""Fills the tables of a page: `python -m drumline.planning.guide PAGE` writes what `drumline plan` computes now.

A table stands between ``<!-- plan: MODEL --gpus N ... -->`` and ``<!-- end -->``; the options are those of the command.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from drumline.planning.advice import advise, gib
from drumline.planning.option import Machine
from drumline.planning.workload import Workload, plans_for

_BLOCK = re.compile(r"(<!-- plan: ([^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return ``page`` with every table computed anew."""
    return _BLOCK.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def table(arguments: str) -> str:
    """Return the Markdown table for the arguments of a command, and its advice.

    Args:
        arguments: ``MODEL --gpus N [--memory 80Gi] [--link ...] [--goal ...] [--batch N] [--length N] [--train]``;
            memory in Gi.
    """
    model, *rest = arguments.split()
    train = "--train" in rest
    words = iter(word for word in rest if word != "--train")
    given = dict(zip(words, words, strict=True))
    memory = int(given.get("--memory", "80Gi").removesuffix("Gi")) << 30
    machine = Machine(int(given["--gpus"]), memory, given.get("--link", "nvlink"))
    workload = Workload(train, int(given.get("--batch", 8)), int(given.get("--length", 4096)))
    found, _ = plans_for(model, machine, workload)
    advice = advise(found, machine, given.get("--goal", "latency"))
    found.sort(key=lambda option: (not option.fits(machine), option.seconds(machine)))
    lines = [
        f"`drumline plan {arguments}`",
        "",
        "| plan | per rank | wire per step | step | |",
        "|---|---|---|---|---|",
    ]
    for option in found:
        notes = ["**recommended**"] if option is advice.best else []
        notes += [] if option.fits(machine) else ["does not fit"]
        notes += [] if option.exact else ["approximate"]
        wire = gib(option.wire) if option.wire else "-"
        seconds = f"{option.seconds(machine) * 1000:.1f} ms"
        lines.append(f"| {option.plan} | {gib(option.memory)} | {wire} | {seconds} | {', '.join(notes)} |")
    why = advice.why[0].upper() + advice.why[1:]
    return "\n".join([*lines, "", f"{why}.", ""])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
