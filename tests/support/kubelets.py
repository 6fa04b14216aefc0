"""Stands in for what an API server alone lacks: kubelets and controllers (pods as Deployments want them, ready at once), and
the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from drumline_operator.cluster import Conflict
from drumline_operator.kube import RESOURCES, KubeCluster

Raw = Mapping[str, Any]
_CHILDREN = ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy")
_MERGE = "application/merge-patch+json"
#: Nothing listens there: the operator hears nothing from the runners of these pods.
_ADDRESS = "127.0.0.9"


class Kubelets:
    """Runs until cancelled.

    Args:
        cluster: a client of the API server that nothing breaks.
        namespace: the only one that is looked after.
    """

    def __init__(self, cluster: KubeCluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        #: Names of all pods that were ever made, in order.
        self.made: list[str] = []

    async def run(self) -> None:
        """Give each Deployment the pods that it wants, and remove what belongs to apps that are no more."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow("Deployment", self._deployment), name="pods")
            for kind in ("DistributedApp", *_CHILDREN):
                group.create_task(self._follow(kind, self._collect), name=f"collect {kind}")

    async def _follow(self, kind: str, sink: Callable[[str, Raw], Awaitable[None]]) -> None:
        while True:
            page = await self._cluster.page(kind, self._namespace, "", "")
            for item in page.items:
                await sink("ADDED", json.loads(bytes(item)))
            async for event in self._cluster.watch(kind, self._namespace, "", page.version):
                if event.type != "BOOKMARK":
                    await sink(event.type, json.loads(bytes(event.object)))

    async def _deployment(self, type: str, deployment: Raw) -> None:
        if type == "DELETED":
            for pod in await self._of(deployment["metadata"]["uid"]):
                await self._delete(pod)
        else:
            await self._serve(deployment)

    async def _collect(self, type: str, changed: Raw) -> None:
        """As the real one does: whenever something is there whose owner is not."""
        if (changed["kind"] == "DistributedApp") != (type == "DELETED"):
            return
        apps = {each["metadata"]["uid"] for each in await self._cluster.list("DistributedApp", self._namespace)}
        for kind in _CHILDREN:
            for each in await self._cluster.list(kind, self._namespace):
                meta = each["metadata"]
                owners = {owner["uid"] for owner in meta.get("ownerReferences") or ()}
                if owners and not owners & apps:
                    # One that is another by now is looked at when its own event comes.
                    with contextlib.suppress(Conflict):
                        await self._cluster.delete(kind, self._namespace, meta["name"], meta["uid"])

    async def _serve(self, deployment: Raw) -> None:
        meta, spec = deployment["metadata"], deployment["spec"]
        if (deployment.get("status") or {}).get("observedGeneration") == meta["generation"]:
            return
        live = await self._cluster.get("Deployment", self._namespace, meta["name"])
        if (
            live is None
            or live["metadata"]["uid"] != meta["uid"]
            or live["metadata"]["generation"] != meta["generation"]
        ):
            return  # another event follows
        revision = str(spec["template"]["metadata"]["labels"]["drumline.dev/revision"])
        mine = await self._of(meta["uid"])
        good = [pod for pod in mine if pod["metadata"]["labels"]["drumline.dev/revision"] == revision]
        for pod in [*(pod for pod in mine if pod not in good), *good[spec["replicas"] :]]:
            await self._delete(pod)
        for _ in range(spec["replicas"] - len(good)):
            await self._make(meta, spec["template"])
        status = {"observedGeneration": meta["generation"], "replicas": spec["replicas"]}
        await self._patch("Deployment", meta["name"], {"status": status}, "status")

    async def _of(self, uid: str) -> list[Raw]:
        pods = await self._cluster.list("Pod", self._namespace)
        return [pod for pod in pods if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    async def _make(self, owner: Raw, template: Raw) -> None:
        reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": owner["name"], "uid": owner["uid"]}
        name = f"{owner['name']}-{len(self.made)}"
        metadata = {**template["metadata"], "name": name, "namespace": self._namespace}
        metadata["ownerReferences"] = [{**reference, "controller": True}]
        spec = {**template["spec"], "nodeName": "node-1"}
        await self._cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self.made.append(name)
        worker = {"name": "worker", "image": "a", "imageID": "a", "ready": True, "started": True, "restartCount": 0}
        status = {
            "phase": "Running",
            "podIP": _ADDRESS,
            "podIPs": [{"ip": _ADDRESS}],
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
            "containerStatuses": [{**worker, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
        }
        await self._patch("Pod", name, {"status": status}, "status")

    async def _delete(self, pod: Raw) -> None:
        path = RESOURCES["Pod"].path(self._namespace, pod["metadata"]["name"])
        await self._cluster._call("DELETE", path, body={"gracePeriodSeconds": 0}, missing=None)

    async def _patch(self, kind: str, name: str, body: Raw, subresource: str) -> None:
        path = RESOURCES[kind].path(self._namespace, name, subresource)
        try:
            await self._cluster._call("PATCH", path, body=body, content_type=_MERGE)
        except Conflict:
            return  # it is gone meanwhile; what follows is another event
