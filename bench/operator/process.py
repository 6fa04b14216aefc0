"""The operator's process, as it runs in its pod, and what it uses."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.processes import free_port

_MIB = 1 << 20
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
#: The operator announces nothing to outsiders: how often its port is asked.
_ASK = 0.1


@dataclass(frozen=True)
class Usage:
    """Of a process: memory in MiB, CPU time in seconds since its start, and when that was so."""

    rss: float
    cpu: float
    at: float


class Operator:
    """One operator outside of the cluster, told everything by its environment.

    Args:
        kubeconfig: how it reaches the API server.
        settings: further ``DRUMLINE_OPERATOR_*`` variables, without their prefix.
    """

    def __init__(self, kubeconfig: Path, **settings: str) -> None:
        self._port = free_port()
        own = {
            "BIND": f"127.0.0.1:{self._port}",
            "NAMESPACE": "drumline-system",
            "LOG_LEVEL": "warning",
            **settings,
        }
        others = {key: value for key, value in os.environ.items() if not key.startswith("DRUMLINE_")}
        self._environment = {
            **others,
            "KUBECONFIG": str(kubeconfig),
            **{f"DRUMLINE_OPERATOR_{key}": value for key, value in own.items()},
        }

    async def __aenter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __aexit__
        self._http = aiohttp.ClientSession(f"http://127.0.0.1:{self._port}")
        self.started = time.perf_counter()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "drumline_operator", env=self._environment, stdout=self._log, stderr=self._log
        )
        self._usage = psutil.Process(self._process.pid)
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await self._ready():
                    await self._pause()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._log.close()

    def usage(self) -> Usage:
        """Return what it uses."""
        times = self._usage.cpu_times()
        return Usage(self._usage.memory_info().rss / _MIB, times.user + times.system, time.perf_counter())

    async def metric(self, name: str) -> float:
        """Return the sum over all labels of one of its metrics."""
        async with self._http.get("/metrics") as answer:
            text = await answer.text()
        samples = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]
        if not samples and name.endswith("_total"):
            return 0.0  # nothing was counted yet
        return sum(samples)

    async def reconciled(self, count: float, limit: float) -> float:
        """Return the time at which at least ``count`` keys had been worked on since its start, and none was left.

        Raises:
            RuntimeError: not within ``limit`` seconds.
        """
        done = 0.0
        try:
            async with asyncio.timeout(limit):
                while True:
                    done = await self.metric("drumline_operator_reconcile_total")
                    if done >= count:
                        return time.perf_counter()
                    await self._pause()
        except TimeoutError:
            raise RuntimeError(f"{done:g} of {count:g} keys were worked on within {limit:g} s\n{self.log()}") from None

    def log(self) -> str:
        """Return the end of what it has printed."""
        self._log.seek(0)
        return "".join(self._log.readlines()[-20:])

    async def _ready(self) -> bool:
        try:
            async with self._http.get("/readyz") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def _pause(self) -> None:
        """Until it is time to ask again, or the process ends, which is an error."""
        try:
            code = await asyncio.wait_for(self._process.wait(), _ASK)
        except TimeoutError:
            return
        raise RuntimeError(f"the operator ended with {code}:\n{self.log()}")
