"""The operator as a process, and waits for what it does; shared by the tests of this folder."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from drumline_operator.kube import KubeCluster

RUNS = "drumline_operator_reconcile_total"
#: Seconds until a wait gives up; a machine with ten times as much to do as it has cores needs half of them.
PATIENCE = 60.0


class Operator:
    """The operator as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.lines: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self._news:
                self.lines.append(json.loads(line))
                self._news.notify_all()
        async with self._news:
            self.lines.append({"message": "the end"})
            self._news.notify_all()

    async def says(self, words: str, start: int = 0) -> dict[str, Any]:
        """Return the first line of its log, from ``start`` on, that has ``words``; waits for it."""
        async with asyncio.timeout(PATIENCE), self._news:
            while True:
                for line in self.lines[start:]:
                    if words in line["message"]:
                        return line
                    assert line["message"] != "the end", self.lines
                start = len(self.lines)
                await self._news.wait()

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )

    async def runs(self, count: int, since: float | None = None) -> None:
        """Return after so many more runs; ``since``: than there had been, default: than there have been."""
        goal = (await self.metric(RUNS) if since is None else since) + count
        async with asyncio.timeout(PATIENCE):
            while await self.metric(RUNS) < goal:  # noqa: ASYNC110 - a counter tells nobody
                await asyncio.sleep(0.05)

    async def probe(self, path: str) -> int:
        """Return the status of a probe."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}{path}") as answer:
            return answer.status

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; return its exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
            await self._reader
        return status


Start = Callable[..., Awaitable[Operator]]


async def until(
    cluster: KubeCluster,
    kind: str,
    namespace: str | None,
    name: str,
    holds: Callable[[Any], object],
    seconds: float = PATIENCE,
) -> Any:
    """Return an object (None: there is none) for which ``holds``; watches until it does."""
    async with asyncio.timeout(seconds):
        while True:
            page = await cluster.page(kind, namespace, "", "")
            found = next((each for each in map(decode, page.items) if each["metadata"]["name"] == name), None)
            if holds(found):
                return found
            async for event in cluster.watch(kind, namespace, "", page.version):
                if event.type == "BOOKMARK" or decode(event.object)["metadata"]["name"] != name:
                    continue
                found = None if event.type == "DELETED" else decode(event.object)
                if holds(found):
                    return found


def decode(raw: Any) -> Any:
    return json.loads(bytes(raw))
