"""A kopf that ends again and again, or hangs, is an error in the log and on /readyz, until it runs again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from e2e.cluster.envtest import EnvTest
from kubernetes.aio.client import Configuration
from tests.handlers.harness import PATIENCE

from drumline.api.v1alpha1 import API_VERSION
from drumline_operator.handlers import Versions, Watch, log
from drumline_operator.kube import KubeCluster, configured

#: Seconds; a kopf that is broken ends at once, on a busy machine, too.
SETTLED = 2.0


@asynccontextmanager
async def running(watch: Watch) -> AsyncIterator[asyncio.Queue[logging.LogRecord]]:
    """Yields what it logs."""
    records: asyncio.Queue[logging.LogRecord] = asyncio.Queue()
    handler = logging.Handler()
    handler.emit = records.put_nowait  # type: ignore[method-assign] # it only logs in the event loop
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    task = asyncio.create_task(watch.run())
    try:
        yield records
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


async def says(records: asyncio.Queue[logging.LogRecord], words: str) -> logging.LogRecord:
    async with asyncio.timeout(PATIENCE):
        while words not in (record := await records.get()).getMessage():
            pass
    return record


class Breaks(Watch):
    """Its kopf ends as it would in a pod whose user has no name, until ``broken`` is cleared."""

    broken = True

    async def _kopf(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        if self.broken:
            raise OSError("No username set in the environment")
        await super()._kopf(loop, stop)


class Login:
    """Credentials that the API server takes, or not."""

    def __init__(self, found: Configuration) -> None:
        self.found, self.right = found, True

    async def __call__(self) -> Mapping[str, Any]:
        server = {"server": self.found.host, "ca_path": self.found.ssl_ca_cert}
        if not self.right:
            return {**server, "scheme": "Bearer", "token": "wrong"}
        return {**server, "certificate_path": self.found.cert_file, "private_key_path": self.found.key_file}


async def test_a_kopf_that_ends_again_and_again_is_trouble(server: EnvTest) -> None:
    login = Login(await configured(server.kubeconfig))
    watch = Breaks(login, lambda *_: None, settled=SETTLED)
    async with running(watch) as records:
        assert watch.wrong() == []
        first = await says(records, "kopf ended")
        assert (first.levelno, watch.wrong()) == (logging.WARNING, [])  # once is no trouble yet
        second = await says(records, "kopf ended")
        assert second.levelno == logging.ERROR
        assert "No username set" in second.getMessage()
        assert "No username set" in " ".join(watch.wrong())
        watch.broken = False
        await says(records, "kopf runs again")
        assert watch.wrong() == []


async def test_a_kopf_that_hangs_is_trouble_and_is_started_again(server: EnvTest, cluster: KubeCluster) -> None:
    """Its login is refused: it says so in its own log, and goes on without watching anything."""
    machine = {"apiVersion": API_VERSION, "kind": "MachineType", "metadata": {"name": "hangs"}, "spec": {}}
    await cluster.apply(machine)
    login = Login(await configured(server.kubeconfig))
    login.right = False
    kept = await known(cluster)
    lists = 0

    async def list_again() -> None:
        nonlocal lists, kept
        lists, kept = lists + 1, await known(cluster)

    looks: asyncio.Queue[int] = asyncio.Queue()

    def look() -> Versions:
        looks.put_nowait(lists)
        return kept

    shown: list[str] = []
    seen = asyncio.Event()

    def sink(kind: str, type: str, raw: Mapping[str, Any]) -> None:
        shown.append(raw["metadata"]["name"])
        if shown[-1] == "hangs":  # beside those of other tests
            seen.set()

    watch = Watch(login, sink, ["default"], settled=SETTLED)  # MachineTypes are seen in any case
    async with running(watch) as records:
        supervisor = asyncio.create_task(watch.supervise(look, list_again))
        try:
            line = await says(records, "kopf hangs")
            assert line.levelno == logging.ERROR
            assert "MachineType" in line.getMessage()
            assert "credentials" in " ".join(watch.wrong())
            assert lists == 1
            assert not shown
            login.right = True
            await says(records, "kopf runs again")
            assert watch.wrong() == []
            async with asyncio.timeout(PATIENCE):
                await seen.wait()
            # What is gone, or new, or not heard of by anybody, is no reason.
            before = lists
            gone = await cluster.get("MachineType", None, "hangs")
            assert gone is not None
            kept = {"MachineType": {**kept["MachineType"], "gone": 1 << 60}}
            async with asyncio.timeout(PATIENCE):
                while await looks.get() == before:
                    pass
                await looks.get()  # the next round has begun
            assert watch.wrong() == []
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)


async def known(cluster: KubeCluster) -> Versions:
    found = await cluster.list("MachineType", None)
    return {
        "MachineType": {each["metadata"]["uid"]: int(each["metadata"]["resourceVersion"]) for each in found},
    }
