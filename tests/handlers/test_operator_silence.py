"""A watch of which nothing is ever heard: no news is no trouble, and what happens later is seen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from e2e.cluster.envtest import EnvTest
from tests.handlers.harness import PATIENCE

from drumline_operator import kube
from drumline_operator.kube import KubeCluster, configured
from drumline_operator.reflector import Reflector, Watched
from drumline_operator.store import Change, Store

#: Seconds; an API server that has bookmarks to send does so once in a minute. Its first word has to come sooner, on a
#: busy machine, too.
SILENCE = 2.0


class Counted(KubeCluster):
    """Tells of each watch that begins."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.begun: asyncio.Queue[str] = asyncio.Queue()

    async def watch(self, kind: str, namespace: str | None, selector: str, version: str) -> AsyncIterator[Watched]:
        self.begun.put_nowait(version)
        async for event in super().watch(kind, namespace, selector, version):
            yield event


async def test_silence_is_no_trouble(
    server: EnvTest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "_SILENCE", SILENCE)
    caplog.set_level(logging.INFO, "drumline_operator")
    seen: asyncio.Queue[Change] = asyncio.Queue()
    async with Counted(await configured(server.kubeconfig)) as source:
        reflector = Reflector(source, Store(seen.put_nowait), "Node")
        task = asyncio.create_task(reflector.run())
        try:
            async with asyncio.timeout(PATIENCE):
                versions = {await source.begun.get() for _ in range(2)}
                assert len(versions) == 1  # each goes on from where the last one was
                heard = reflector.heard
                await source.begun.get()
                assert heard is not None
                assert reflector.heard is not None
                assert reflector.heard > heard  # else its age would grow for ever
                await source.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "late"}})
                while (await seen.get()).any.name != "late":  # others are those of other tests
                    pass
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await remove(source)
    assert caplog.messages == []


async def remove(source: KubeCluster) -> None:
    """Other tests count nodes."""
    node = await source.get("Node", None, "late")
    if node is not None:
        await source.delete("Node", None, "late", node["metadata"]["uid"])  # type: ignore[arg-type] # it has none
