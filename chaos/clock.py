"""A wall clock that can be set, for the server and its ranks alone: a small library that is preloaded into them."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")
#: Seconds that a roll moves the clock to, from the real time: what NTP, a suspended machine and a wrong battery do.
ROLLS = (0, 2, -2, 61, -61, 3600, -3600, 86_400 * 3, -86_400 * 3, 86_400 * 400, -86_400 * 400)


def available() -> bool:
    """Whether libraries are preloaded as on Linux, and there is a C compiler to build one with."""
    return sys.platform == "linux" and shutil.which("cc") is not None


class Clock:
    """The offset that every preloaded process reads.

    Args:
        folder: where library and offset are kept.
    """

    def __init__(self, folder: Path) -> None:
        library, offset = folder / "clock.so", folder / "clock"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"], check=True
        )
        offset.write_bytes(struct.pack("q", 0))
        with offset.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(offset)}
        self.offset = 0

    def roll(self, seconds: int) -> None:
        """Let the wall clock be ``seconds`` after (or before) the real one, from now on."""
        self._map[:8] = struct.pack("q", seconds)
        self.offset = seconds

    def close(self) -> None:
        """Forget the offset; processes that still run keep it."""
        self._map.close()
