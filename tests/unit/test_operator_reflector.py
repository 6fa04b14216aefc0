"""The reflector: list, watch from there, list again when that is too old; back off, and tell what it may not see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec import Raw

from drumline_operator.cluster import ClusterError, Expired, Forbidden, Unavailable
from drumline_operator.reflector import Page, Reflector, Watched
from drumline_operator.store import Store
from drumline_operator.watches import Watches


def service(name: str, version: int) -> Raw:
    meta = {"name": name, "namespace": "n", "uid": name, "resourceVersion": str(version)}
    return Raw(json.dumps({"metadata": meta, "spec": {"version": version}}).encode())


class Script:
    """A source that answers what it is told to; a call that nothing is told about waits."""

    def __init__(self) -> None:
        self.lists: asyncio.Queue[Page | ClusterError] = asyncio.Queue()
        self.events: asyncio.Queue[Watched | ClusterError | None] = asyncio.Queue()
        self.calls: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def page(self, kind: str, namespace: str | None, selector: str, token: str) -> Page:
        self.calls.put_nowait(("list", token))
        answer = await self.lists.get()
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    async def watch(self, kind: str, namespace: str | None, selector: str, version: str) -> AsyncIterator[Watched]:
        self.calls.put_nowait(("watch", version))
        while (event := await self.events.get()) is not None:
            if isinstance(event, ClusterError):
                raise event
            yield event

    async def call(self) -> tuple[str, str]:
        async with asyncio.timeout(4):
            return await self.calls.get()


@asynccontextmanager
async def reflecting(script: Script, *, optional: bool = False) -> AsyncIterator[tuple[Reflector, Store]]:
    store = Store()
    reflector = Reflector(script, store, "Service", optional=optional)
    task = asyncio.create_task(reflector.run())
    try:
        yield reflector, store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def names(store: Store) -> list[str]:
    return sorted(kept.name for kept in store.all("Service"))


async def test_list_then_watch_from_there() -> None:
    script = Script()
    script.lists.put_nowait(Page([service("a", 3)], "10", "more"))
    script.lists.put_nowait(Page([service("b", 4)], "10"))
    async with reflecting(script) as (reflector, store):
        assert [await script.call() for _ in range(3)] == [("list", ""), ("list", "more"), ("watch", "10")]
        assert reflector.synced.is_set()
        assert names(store) == ["a", "b"]
        script.events.put_nowait(Watched("ADDED", service("c", 11), "11"))
        script.events.put_nowait(Watched("DELETED", service("a", 12), "12"))
        script.events.put_nowait(Watched("BOOKMARK", service("", 20), "20"))
        script.events.put_nowait(None)
        assert await script.call() == ("watch", "20")
        assert names(store) == ["b", "c"]


@pytest.mark.parametrize("at", ["list", "watch"])
async def test_what_is_too_old_is_listed_anew_and_what_has_gone_is_noticed(at: str) -> None:
    script = Script()
    script.lists.put_nowait(Page([service("a", 3), service("b", 3)], "10"))
    async with reflecting(script) as (_, store):
        assert [await script.call() for _ in range(2)] == [("list", ""), ("watch", "10")]
        script.events.put_nowait(Expired("too old resource version"))
        if at == "list":
            script.lists.put_nowait(Expired("the continue token is too old"))
        script.lists.put_nowait(Page([service("b", 13)], "15"))
        while (call := await script.call()) != ("watch", "15"):
            assert call == ("list", "")
        assert names(store) == ["b"]


async def test_a_watch_that_breaks_goes_on_where_it_was() -> None:
    script = Script()
    script.lists.put_nowait(Page([], "10"))
    async with reflecting(script) as (_, store):
        assert [await script.call() for _ in range(2)] == [("list", ""), ("watch", "10")]
        script.events.put_nowait(Watched("ADDED", service("a", 11), "11"))
        script.events.put_nowait(Unavailable("connection reset"))
        assert await script.call() == ("watch", "11")
        assert names(store) == ["a"]


async def test_what_may_not_be_seen() -> None:
    for optional in (True, False):
        script = Script()
        script.lists.put_nowait(Forbidden("nodes is forbidden"))
        async with reflecting(script, optional=optional) as (reflector, _):
            assert [await script.call() for _ in range(2)] == [("list", ""), ("list", "")]
            assert reflector.forbidden
            assert reflector.synced.is_set() == optional
            script.lists.put_nowait(Page([], "10"))
            assert await script.call() == ("watch", "10")
            assert not reflector.forbidden
            assert reflector.synced.is_set()


class Walls:
    """A source that shows all kinds but those that are forbidden."""

    def __init__(self) -> None:
        self.forbidden = {"ConfigMap", "Node"}
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def page(self, kind: str, namespace: str | None, selector: str, token: str) -> Page:
        if kind in self.forbidden:
            raise Forbidden(f"{kind} is forbidden")
        return Page([], "10")

    async def watch(self, kind: str, namespace: str | None, selector: str, version: str) -> AsyncIterator[Watched]:
        self.asked.put_nowait(kind)
        await asyncio.Event().wait()
        yield Watched("BOOKMARK", service("", 20), "20")


async def test_what_the_operator_can_do_without_does_not_keep_it_unready() -> None:
    source = Walls()
    watches = Watches(source, Store(), [], nodes=True)
    task = asyncio.create_task(watches.run())
    try:
        await watches.list_custom()
        async with asyncio.timeout(4):
            await source.asked.get()
        watches.want_sources(["n"])
        assert "ConfigMap" in watches.missing()
        async with asyncio.timeout(4):
            await watches.synced()
        assert watches.missing() == []
        assert watches.refused("Node")
        assert not watches.watched("ConfigMap", "n")  # so each is read from the API server
        source.forbidden.clear()
        async with asyncio.timeout(4):
            while {await source.asked.get()} != {"ConfigMap"}:
                pass
        assert watches.watched("ConfigMap", "n")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
