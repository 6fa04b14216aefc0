"""What a kubelet does for a container: start the server, notice its end, start it again; and what an auditor does after."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil
from bench.processes import free_port

_MARK = "DRUMLINE_CHAOS"
_READY_SECONDS = 60.0
_GONE_SECONDS = 10.0


class Pod:
    """A server process and its descendants, restarted for ever.

    Attributes:
        url: where it listens.
        lives: how many times it was started.
        dying: it was told to end, or has ended, and is not up again.
        ranks: world size.
    """

    def __init__(self, ranks: int, **settings: str) -> None:
        self.ranks = ranks
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lives = 0
        self.dying = False
        self.mark = uuid.uuid4().hex
        self.problems: list[str] = []
        self.changed = asyncio.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="drumline-chaos-")
        self.temp = Path(self._folder.name) / "tmp"
        self.temp.mkdir()
        self.log = Path(self._folder.name) / "log"
        self._settings = settings
        self._over = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_READY_SECONDS))
        self._watch = asyncio.create_task(self._run())
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        self.process.send_signal(signal.SIGTERM)
        await self._watch
        await self._session.close()
        self._audit("after the end")
        self._folder.cleanup()

    async def _run(self) -> None:
        while not self._over:
            self.start()
            code = await asyncio.to_thread(self.process.wait)
            self.dying = True
            self._wake()
            if self._over and code != 0:
                self.problems.append(f"the server ended with {code} after SIGTERM")
            await asyncio.to_thread(self._audit, f"after life {self.lives}")

    def start(self) -> None:
        """Start the server."""
        drumline = str(Path(sys.executable).with_name("drumline"))
        worker = f"{Path(__file__).with_name('worker.py')}:Chaos"
        command = [drumline, "run", worker, "-n", str(self.ranks), "--device", "cpu", "--port", str(self.port)]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temp), _MARK: self.mark,
            "DRUMLINE_LOG_LEVEL": "warning", "DRUMLINE_DRAIN_DELAY": "0", "DRUMLINE_DRAIN_TIMEOUT": "5",
            **self._settings,
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.lives += 1
        self.dying = False
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    # -- status

    async def status(self, since: int | None = None) -> dict[str, Any] | None:
        """Return the server's status, after its next change when ``since`` is a version; None without an answer."""
        query = {} if since is None else {"since": str(since)}
        try:
            async with self._session.get(f"{self.url}/status", params=query) as answer:
                status: dict[str, Any] = await answer.json(content_type=None)
                return status
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    async def ready(self) -> dict[str, Any]:
        """Wait until every rank is ready; return the status.

        Raises:
            TimeoutError: it did not come back in time.
        """
        deadline = time.monotonic() + _READY_SECONDS
        since: int | None = None
        while time.monotonic() < deadline:
            status = await self.status(since)
            if status is None:  # not listening (yet): the only sign of that is trying
                since = None
                await asyncio.sleep(0.05)
            elif status["state"] == "ready" and status["readyRanks"] == self.ranks:
                return status
            else:
                since = status["version"]
        raise TimeoutError(f"not ready within {_READY_SECONDS:g} s: {await self.status()}\n{self.tail()}")

    async def until_ready(self, clients: Any) -> None:
        """Wait for readiness on behalf of a refused client, unless all is over."""
        if not clients.over:
            await self.ready()

    # -- processes

    def family(self) -> list[psutil.Process]:
        """Return every process that carries this pod's mark, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def nursery(self) -> psutil.Process | None:
        """Return the parent of the ranks."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return None
        return next((child for child in children if child.is_running()), None)

    def _audit(self, when: str) -> None:
        """Note what a dead server left behind: processes, and files in its temporary folder."""
        deadline = time.monotonic() + _GONE_SECONDS
        left = self.family()
        while left and time.monotonic() < deadline:
            _, left = psutil.wait_procs(left, timeout=0.1)
        for process in left:
            self.problems.append(f"{when}: process {process.pid} was left behind")
            process.kill()
        files = [path.name for path in self.temp.iterdir()]
        if files:
            self.problems.append(f"{when}: {files[:5]} were left in the temporary folder")
            for path in self.temp.iterdir():
                subprocess.run(["rm", "-rf", "--", str(path)], check=False)

    def descriptors(self) -> int:
        """Return how many file descriptors the server holds."""
        try:
            return psutil.Process(self.process.pid).num_fds()
        except psutil.NoSuchProcess:
            return 0

    def tail(self, size: int = 3000) -> str:
        """Return the end of the server's log."""
        try:
            return self.log.read_text(errors="replace")[-size:]
        except OSError:
            return ""
