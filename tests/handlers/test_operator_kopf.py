"""A kopf that ends again and again is an error in the log and on /readyz, until it runs again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from e2e.cluster.envtest import EnvTest

from drumline_operator.handlers import Watch, log
from drumline_operator.kube import configured

#: Seconds; a kopf that is broken ends at once.
SETTLED = 1.0


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
    async with asyncio.timeout(30):
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


async def test_a_kopf_that_ends_again_and_again_is_trouble(server: EnvTest) -> None:
    found = await configured(server.kubeconfig)

    async def login() -> Mapping[str, Any]:
        return {
            "server": found.host,
            "ca_path": found.ssl_ca_cert,
            "certificate_path": found.cert_file,
            "private_key_path": found.key_file,
        }

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
