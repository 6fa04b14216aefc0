"""What a kubelet does for a container: start the server, notice its end, start it again; and what an auditor does after."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import psutil
from bench.processes import free_port

from drumline.contract import RestartSettings, RunnerSettings

if TYPE_CHECKING:
    from chaos.clients import Clients

MARK = "CHAOS_MARK"
_READY_SECONDS = 60.0
_GONE_SECONDS = 10.0
_ANSWER_SECONDS = 35.0  # a long poll of the status takes up to 30
#: glibc keeps up to 64 MiB of what was freed once large blocks were: with these it gives it back, and growth is a leak's.
_NO_HOARD = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
#: As a kubelet that has just begun to back off.
_RESTART_PAUSE = 0.2


class Pod:
    """A server process and its descendants, restarted for ever.

    Args:
        folder: for its temporary files (``tmp``, which may be a small disk of its own), log and termination log.
        ranks: world size.
        restart: budget of the group.
        environment: further variables.

    Attributes:
        url: where it listens.
        lives: how many times it was started.
        dying: it was told to end, or has ended, or may not be able to start, and is not up again.
        problems: what was wrong about its ends.
        ends: exit codes, oldest first.
        said: the JSON object at the end of the last termination log; empty when there was none.
    """

    def __init__(self, folder: Path, ranks: int, restart: RestartSettings, environment: dict[str, str]) -> None:
        self.ranks = ranks
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lives = 0
        self.dying = False
        self.mark = uuid.uuid4().hex
        self.problems: list[str] = []
        self.ends: list[int] = []
        self.said: dict[str, Any] = {}
        self.temp = folder / "tmp"
        self.termination = folder / "termination-log"
        self._log = folder / "log"
        self._changed = asyncio.Condition()
        self._settings = RunnerSettings(
            target=f"{Path(__file__).with_name('worker.py')}:Chaos", world_size=ranks, device="cpu", port=self.port,
            restart=restart, hang_timeout=3, cancel_grace=3, drain_delay=0, drain_timeout=5, max_queue_depth=16,
            stream_buffer_bytes=4 << 20, log_format="json", termination_log=str(self.termination),
        )  # fmt: skip
        self._environment = environment
        self._over = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS))
        self._start()
        self._watch = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = self.dying = True
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        await self._watch
        await self._session.close()

    async def _run(self) -> None:
        while True:
            code = await asyncio.to_thread(self.process.wait)
            self.ends.append(code)
            self.said = self._termination()
            if not self.dying:
                self.problems.append(f"life {self.lives} ended by itself with {code}: {self.tail()}")
            elif self._over and code != 0:
                self.problems.append(f"the server ended with {code} after SIGTERM: {self.tail()}")
            self.dying = True
            await asyncio.to_thread(self._audit, f"after life {self.lives}")
            if self._over:
                return
            await asyncio.sleep(_RESTART_PAUSE)
            self._start()
            async with self._changed:
                self._changed.notify_all()

    def _start(self) -> None:
        self.termination.write_bytes(b"")
        environment = {
            **os.environ, **self._settings.to_env(), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temp), MARK: self.mark,
            **_NO_HOARD, **self._environment,
        }  # fmt: skip
        with self._log.open("ab") as log:
            command = [str(Path(sys.executable).with_name("drumline")), "serve"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.lives += 1

    # -- what the driver does

    async def end(self, number: signal.Signals) -> None:
        """Send ``number`` to the server, and wait until another one was started."""
        lives, self.dying = self.lives, True
        self.process.send_signal(number)
        await self.another(lives)

    async def another(self, lives: int) -> None:
        """Wait until there is another server than that of life ``lives``."""
        async with asyncio.timeout(_READY_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self.lives != lives)

    async def post(self, path: str) -> int | None:
        """Send an empty POST; return the status, None without an answer."""
        try:
            async with self._session.post(self.url + path) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def ask(self) -> int | None:
        """Ask for nothing in particular, on a connection of its own; return the status, None without an answer."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_READY_SECONDS)) as session,
                session.post(self.url, json={}) as answer,
            ):
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def date(self) -> str | None:
        """Return the ``Date`` header of a healthy answer."""
        try:
            async with self._session.get(f"{self.url}/healthz") as answer:
                return answer.headers.get("Date")
        except (aiohttp.ClientError, TimeoutError):
            return None

    # -- status

    async def status(self, since: int | None = None, path: str = "/status") -> dict[str, Any] | None:
        """Return the server's status, after its next change when ``since`` is a version; None without an answer."""
        query = {} if since is None else {"since": str(since)}
        try:
            async with self._session.get(self.url + path, params=query) as answer:
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

    async def until_ready(self, clients: Clients) -> None:
        """Wait for readiness on behalf of a refused client, unless all is over."""
        if not clients.over:
            await self.ready()

    # -- processes

    def family(self) -> list[psutil.Process]:
        """Return every process that carries this pod's mark, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
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
        files = [path for path in self.temp.iterdir() if not path.name.startswith("chaos-")]
        if files:
            self.problems.append(f"{when}: {[path.name for path in files][:5]} were left in the temporary folder")
            for path in files:
                subprocess.run(["rm", "-rf", "--", str(path)], check=False)

    # -- log

    def take_log(self) -> Iterator[bytes]:
        """Yield the lines of the log so far, and forget them."""
        with self._log.open("r+b") as log:
            yield from (line for line in log if line.endswith(b"\n"))
            log.truncate(0)  # the server appends

    def tail(self, size: int = 3000) -> str:
        """Return the end of the server's log, without what was cut."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 50 * size))
                lines = [line[:1000] for line in log if b'"level":"info"' not in line]
        except OSError:
            return ""
        return b"".join(lines).decode(errors="replace")[-size:]

    def _termination(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.termination.read_text().rpartition("\n")[2])
        except ValueError:
            return {}
        return found
