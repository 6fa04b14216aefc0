"""A rank in a fresh interpreter, where forking is not possible: ``python -m drumline.rank DESCRIPTOR``."""

from __future__ import annotations

import os
import sys

import msgspec

from drumline.nursery_protocol import RankConfig
from drumline.rank.parent import die_with


class _Settings(msgspec.Struct):
    config: RankConfig
    fds: list[int]
    path: list[str]


def main(source: int) -> None:
    """Read the settings from an inherited file, import the worker's module, be the rank."""
    with open(source, "rb") as file:
        file.seek(0)
        settings = msgspec.json.decode(file.read(), type=_Settings)
    die_with(int(os.environ.pop("DRUMLINE_PARENT")))
    sys.path[:] = settings.path
    for descriptor in settings.fds:
        os.set_inheritable(descriptor, False)
    from drumline import targets
    from drumline.rank.main import run_rank

    run_rank(settings.config, settings.fds, targets.resolve(settings.config.reference))


if __name__ == "__main__":
    main(int(sys.argv[1]))
