"""The first thing that the ``drumline`` command does: let torch be imported while it imports itself.

Importing this module loads neither pydantic (which typer does) nor YAML: that takes longer than all that is done here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from drumline import scan, targets
from drumline.errors import DrumlineError
from drumline.runner.nursery_process import Asked, start_early


def main() -> None:
    """Entry point of the ``drumline`` script."""
    begin(guess(sys.argv[1:], os.environ))
    from drumline.cli import main as command

    command()


def guess(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The target of a command line that is not parsed yet; empty when it serves nothing, or one cannot be seen at once.

    Args:
        arguments: what follows the command's name; ``run`` has its target in front of all options, or is not looked at.
        environment: has the target of ``serve``.
    """
    match arguments:
        case ["run", target, *options] if not {"--reload", "--help", "-h"} & set(options):
            return target
        case ["serve"] | ["serve", "--debug"]:
            return environment.get("DRUMLINE_TARGET", "")
    return ""


def begin(target: str) -> None:
    """Start the process that starts ranks, for a worker class that is named without a manifest.

    It imports torch and the worker's module while this process reads its settings and imports its server. The runner of that
    class takes it over; if none does, because a setting is wrong, it ends with this process. Nothing is told here: what is
    wrong with the target is told where it is looked at for good.

    Args:
        target: path.py, path.py:Class or module:Class. An App, a manifest and what does not exist are left alone.
    """
    try:
        reference = targets.parse(target).reference
        kind = scan.kind_of(reference)
    except (DrumlineError, OSError, ValueError):
        return
    if kind == "worker":
        start_early(Asked(reference))
