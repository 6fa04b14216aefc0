"""``python -m drumline_operator``: the operator, told everything by its environment."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import uvloop

from drumline import logs
from drumline.errors import ConfigurationError
from drumline_operator.process import Process
from drumline_operator.settings import from_env


def main() -> int:
    """Run until SIGTERM or SIGINT; return the exit status: 0, or 2 when a setting is wrong."""
    try:
        operator, process = from_env(os.environ)
        logs.configure(process.log_format, process.log_level)
        logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLogger().level))
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # signals are ours, not its
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(Process(operator, process)))
    except ConfigurationError as error:
        print(f"drumline-operator: {error}", file=sys.stderr)  # noqa: T201 - logs are not set up without settings
        return 2
    return 0


async def _run(process: Process) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await process.run(stop)
    except* ConfigurationError as group:
        raise group.exceptions[0] from None


if __name__ == "__main__":
    sys.exit(main())
