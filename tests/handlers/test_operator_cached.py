"""Reads from the store, writes to a real API server: what is written is seen at once, what is gone is noticed."""

from __future__ import annotations

from typing import Any

import pytest

from drumline_operator.cached import CachedCluster
from drumline_operator.cluster import Conflict, Forbidden
from drumline_operator.kube import KubeCluster
from drumline_operator.store import Store


async def said(uid: str) -> dict[str, Any]:
    return {"state": uid}


class World:
    """A cached cluster, what it is told, and a clock."""

    def __init__(self, kube: KubeCluster) -> None:
        self.kube, self.store, self.now = kube, Store(), 0.0
        self.told: list[tuple[Any, ...]] = []
        self.watched, self.refused = False, False
        self.cached = CachedCluster(
            kube,
            self.store,
            runner=said,
            tell=lambda *event: self.told.append(event),
            watched=lambda kind, namespace: self.watched,
            refused=lambda kind: self.refused,
            clock=lambda: self.now,
        )

    async def see(self, kind: str, namespace: str, name: str) -> Any:
        """What a watch would tell."""
        text = await self.kube.read(kind, namespace, name)
        assert text is not None
        self.store.seen(kind, text)
        return self.store.get(kind, namespace, name)


@pytest.fixture
def world(cluster: KubeCluster) -> World:
    return World(cluster)


@pytest.fixture
async def app(world: World, namespace: str) -> Any:
    raw = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "sdxl", "namespace": namespace},
        "spec": {"workerClass": "app:Worker", "image": "a:1", "numGPUs": 0},
    }
    await world.kube.create(raw)
    return await world.see("DistributedApp", namespace, "sdxl")


def wanted(app: Any, **spec: Any) -> dict[str, Any]:
    meta = {key: app["metadata"][key] for key in ("name", "namespace")}
    return {**{key: app[key] for key in ("apiVersion", "kind")}, "metadata": meta, "spec": {**app["spec"], **spec}}


def service(app: Any, port: int = 1) -> dict[str, Any]:
    meta = app["metadata"]
    owner = {"apiVersion": app["apiVersion"], "kind": app["kind"], "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {"drumline.dev/app": meta["name"]},
            "ownerReferences": [{**owner, "controller": True}],
        },
        "spec": {"ports": [{"name": "http", "port": port}]},
    }


async def test_a_write_is_seen_before_any_watch(world: World, app: Any, namespace: str) -> None:
    await world.cached.apply(service(app))
    found = await world.cached.get("Service", namespace, "sdxl")
    assert found is not None
    assert found["spec"]["ports"][0]["port"] == 1
    assert [each["metadata"]["uid"] for each in world.store.of_app("Service", namespace, "sdxl")] == [
        found["metadata"]["uid"]
    ]
    status = {"summary": "0/1", "conditions": []}
    await world.cached.set_status(app, status)
    again = await world.cached.get("DistributedApp", namespace, "sdxl")
    assert again is not None
    assert again["status"] == status
    await world.cached.delete("Service", namespace, "sdxl", found["metadata"]["uid"])
    assert await world.cached.get("Service", namespace, "sdxl") is None


async def test_nothing_is_made_for_an_app_that_is_gone_without_a_word(world: World, app: Any, namespace: str) -> None:
    await world.kube.delete("DistributedApp", namespace, "sdxl", app["metadata"]["uid"])
    with pytest.raises(Conflict, match="gone"):
        await world.cached.apply(service(app))
    assert await world.kube.get("Service", namespace, "sdxl") is None
    assert await world.cached.get("DistributedApp", namespace, "sdxl") is None


async def test_nothing_is_made_for_an_app_that_was_replaced(world: World, app: Any, namespace: str) -> None:
    await world.kube.delete("DistributedApp", namespace, "sdxl", app["metadata"]["uid"])
    await world.kube.create(wanted(app))
    with pytest.raises(Conflict, match="another one"):
        await world.cached.apply(service(app))
    fresh = await world.cached.get("DistributedApp", namespace, "sdxl")
    assert fresh is not None
    await world.cached.apply(service(fresh))


async def test_a_status_that_came_too_late_brings_what_is_there(world: World, app: Any, namespace: str) -> None:
    await world.kube.apply(wanted(app, replicas=4))
    with pytest.raises(Conflict):
        await world.cached.set_status(app, {"summary": "0/1"})
    fresh = await world.cached.get("DistributedApp", namespace, "sdxl")
    assert fresh is not None
    assert fresh["spec"]["replicas"] == 4


async def test_an_object_of_somebody_else_is_not_changed(world: World, app: Any, namespace: str) -> None:
    theirs = service(app, port=9)
    del theirs["metadata"]["ownerReferences"], theirs["metadata"]["labels"]
    await world.kube.create(theirs)
    with pytest.raises(Conflict, match="not this app's"):
        await world.cached.apply(service(app))
    found = await world.cached.get("Service", namespace, "sdxl")
    assert found is not None
    assert found["spec"]["ports"][0]["port"] == 9
    await world.kube.delete("Service", namespace, "sdxl", found["metadata"]["uid"])
    assert await world.cached.get("Service", namespace, "sdxl") is None
    await world.cached.apply(service(app))


async def test_a_child_whose_making_nobody_told_of_is_this_apps_all_the_same(
    world: World, app: Any, namespace: str
) -> None:
    await world.kube.apply(service(app, port=9))  # the answer was lost, and the watch is late
    await world.cached.apply(service(app))
    found = await world.cached.get("Service", namespace, "sdxl")
    assert found is not None
    assert [each["port"] for each in found["spec"]["ports"]] == [1]
    fields = (await world.kube.get("Service", namespace, "sdxl") or {})["metadata"]["managedFields"]
    assert [each["operation"] for each in fields] == ["Apply"]


async def test_an_app_that_was_just_shown_is_not_read_again_unless_a_child_goes(
    world: World, app: Any, namespace: str
) -> None:
    await world.kube.delete("DistributedApp", namespace, "sdxl", app["metadata"]["uid"])
    world.cached.shown(namespace, "sdxl", app["metadata"]["uid"])
    await world.cached.apply(service(app))  # the garbage collector removes it
    found = await world.cached.get("Service", namespace, "sdxl")
    await world.cached.delete("Service", namespace, "sdxl", found["metadata"]["uid"])
    world.cached.doubted(namespace, "sdxl")
    with pytest.raises(Conflict, match="gone"):
        await world.cached.apply(service(app))


async def test_events_come_later(world: World, app: Any) -> None:
    await world.cached.event(app, "Normal", "Created", "Service made")
    assert world.told == [(app, "Normal", "Created", "Service made")]


async def test_a_config_map_is_read_once_for_each_version(world: World, namespace: str) -> None:
    meta = {"name": "code", "namespace": namespace}
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"app.py": "one"}}
    await world.kube.create(code)
    first = await world.cached.get("ConfigMap", namespace, "code")
    assert first is not None
    world.watched = True
    assert await world.cached.get("ConfigMap", namespace, "code") is None  # the watch has not shown it
    page = await world.kube.page("ConfigMap", namespace, "", "")
    assert not any(b"one" in bytes(item) for item in page.items)
    for item in page.items:
        world.store.seen("ConfigMap", item)
    for _ in range(2):
        found = await world.cached.get("ConfigMap", namespace, "code")
        assert found is not None
        assert found["data"] == {"app.py": "one"}
        # It is not read anew until the watch shows another version.
        await world.kube.apply({**code, "data": {"app.py": "two"}})
    await world.see("ConfigMap", namespace, "code")
    found = await world.cached.get("ConfigMap", namespace, "code")
    assert found is not None
    assert found["data"] == {"app.py": "two"}


async def test_what_may_not_be_listed(world: World) -> None:
    assert await world.cached.list("Node", None) == []
    world.refused = True
    with pytest.raises(Forbidden):
        await world.cached.list("Node", None)
    assert await world.cached.runner_status({"metadata": {"uid": "u"}}, 1) == {"state": "u"}
