"""One virtual environment per server that is compared, made from its pinned requirements and kept for the next run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python_of(requirements: str | None) -> str:
    """Return the interpreter of the environment of ``requirements/<name>.txt``; make it when it is not there.

    Args:
        requirements: name of the file, or None for the project's own environment.

    Raises:
        RuntimeError: it cannot be made; the message has the installer's words.
    """
    if requirements is None:
        return sys.executable
    file = HERE / "requirements" / f"{requirements}.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(version.encode() + file.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drumline" / "bench"
    home = cache / f"{requirements}-{digest}"
    python = home / "bin" / "python"
    if (home / "complete").is_file():
        return str(python)
    shutil.rmtree(home, ignore_errors=True)
    uv = str(ROOT / "tools" / "uv")
    _run(uv, "venv", "--quiet", "--python", sys.executable, str(home))
    _run(uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(file))
    (home / "complete").touch()
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
