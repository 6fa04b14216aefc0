"""A mount namespace of our own: a small disk and a small ``/dev/shm`` that may be filled, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_INSIDE = "CHAOS_ROOM"
SHM = Path("/dev/shm")
DISK_BYTES = 48 << 20
DISK_FILES = 4096
SHM_BYTES = 32 << 20


def available() -> bool:
    """Whether this user may make a mount namespace here."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run([*_unshare(), "true"], capture_output=True, check=False).returncode == 0


def _unshare() -> list[str]:
    return ["unshare", "-m", "--propagation", "private"] if os.geteuid() == 0 else ["unshare", "-rm"]


def inside() -> bool:
    """Whether this process is in the room already."""
    return os.environ.get(_INSIDE) == str(os.getpid())


def enter() -> NoReturn:
    """Run this program again, with the same arguments and process id, in a namespace of its own; never returns."""
    os.environ[_INSIDE] = str(os.getpid())
    sys.stdout.flush()
    command = [*_unshare(), sys.executable, "-m", "chaos", *sys.argv[1:]]
    os.execvp(command[0], command)  # the kernel unmounts everything with the last process


def furnish(disk: Path) -> None:
    """Mount a small disk at ``disk`` and a small ``/dev/shm``."""
    for path, size, files in ((disk, DISK_BYTES, DISK_FILES), (SHM, SHM_BYTES, DISK_FILES)):
        options = f"size={size},nr_inodes={files},mode=1777"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(path)], check=True)


def clear(disk: Path) -> None:
    """Unmount the small disk, so that its folder can be removed."""
    subprocess.run(["umount", "-l", str(disk)], check=True)


@contextlib.contextmanager
def filled(folder: Path, *, inodes: bool) -> Iterator[None]:
    """Leave no room in ``folder``: no byte, or no further file; there is room again after the block."""
    with tempfile.TemporaryDirectory(prefix="chaos-full-", dir=folder) as full:
        try:
            _fill(Path(full), inodes=inodes)
        except OSError:
            yield  # that is what full means
        else:
            raise RuntimeError(f"{folder} cannot be filled")


def _fill(folder: Path, *, inodes: bool) -> None:
    if inodes:
        for number in range(DISK_FILES + 1):
            (folder / str(number)).touch()
        return
    with (folder / "bytes").open("wb", buffering=0) as file:
        for piece in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * piece) == piece:
                    pass
        file.write(b"\0")
