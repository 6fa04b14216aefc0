"""The port to the cluster over the Kubernetes client: the only module that knows it.

Paths are written down rather than discovered: the operator uses ten kinds, and starts without reading the whole API.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, ApiException, Configuration

from drumline.api.v1alpha1 import GROUP
from drumline_operator.cluster import ClusterError, Conflict, Forbidden, Raw, Refused, Throttled, Unavailable
from drumline_operator.manifests.names import FIELD_MANAGER


class Resource(NamedTuple):
    """Where a kind lives in the API."""

    base: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the path of an object, or of all of them."""
        within = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return "/".join(part for part in (f"{self.base}{within}/{self.plural}", name, subresource) if part)


RESOURCES: Final = {
    "DistributedApp": Resource(f"/apis/{GROUP}/v1alpha1", "distributedapps"),
    "MachineType": Resource(f"/apis/{GROUP}/v1alpha1", "machinetypes", namespaced=False),
    "Deployment": Resource("/apis/apps/v1", "deployments"),
    "Service": Resource("/api/v1", "services"),
    "PodDisruptionBudget": Resource("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": Resource("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Pod": Resource("/api/v1", "pods"),
    "ConfigMap": Resource("/api/v1", "configmaps"),
    "Node": Resource("/api/v1", "nodes", namespaced=False),
    "Event": Resource("/api/v1", "events"),
}
_PAGE: Final = 500
_APPLY: Final = "application/apply-patch+yaml"
_RUNNER_SECONDS: Final = 2.0
#: Kubernetes' own limit of an event's message.
_EVENT_LIMIT: Final = 1024


class KubeCluster:
    """A :class:`drumline_operator.cluster.Cluster`.

    Args:
        configuration: where the API server is; None: the pod's service account, else the kubeconfig's current context.
        timeout: seconds that one call may take.
    """

    def __init__(self, configuration: Configuration | None = None, timeout: float = 15.0) -> None:
        self._configuration, self._timeout = configuration, timeout

    async def __aenter__(self) -> Self:
        if self._configuration is None:
            self._configuration = Configuration()
            try:
                config.load_incluster_config(client_configuration=self._configuration)
            except config.ConfigException:
                await config.load_kube_config(client_configuration=self._configuration)
        self._api = ApiClient(self._configuration)
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_RUNNER_SECONDS))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()
        await self._api.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return an object, or None when there is none."""
        found: Raw | None = await self._call("GET", RESOURCES[kind].path(namespace, name), missing=None)
        return found

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Raw]:
        """Return all objects of a kind that carry the labels of ``selector``."""
        found: list[Raw] = []
        query = {"limit": str(_PAGE), **({"labelSelector": selector} if selector else {})}
        while True:
            page = await self._call("GET", RESOURCES[kind].path(namespace), query) or {}
            found += page.get("items") or ()
            query["continue"] = (page.get("metadata") or {}).get("continue") or ""
            if not query["continue"]:
                return found

    async def apply(self, manifest: Raw) -> None:
        """Make an object be like ``manifest``."""
        meta = manifest["metadata"]
        path = RESOURCES[manifest["kind"]].path(meta.get("namespace"), meta["name"])
        await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER, "force": "true"}, manifest, _APPLY)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete an object if it has this uid; one that is gone already is no error."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        await self._call("DELETE", RESOURCES[kind].path(namespace, name), body=body, missing=None)

    async def set_status(self, raw: Raw, status: Raw) -> None:
        """Write the status of ``raw``, if nobody has changed it since; the API server ignores a uid here."""
        meta = raw["metadata"]
        body = {
            "apiVersion": raw["apiVersion"],
            "kind": raw["kind"],
            "metadata": {key: meta[key] for key in ("name", "namespace", "resourceVersion") if key in meta},
            "status": status,
        }
        path = RESOURCES[raw["kind"]].path(meta.get("namespace"), meta["name"], "status")
        await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER, "force": "true"}, body, _APPLY)

    async def event(self, raw: Raw, type: str, reason: str, message: str) -> None:
        """Attach an event to ``raw``."""
        meta = raw["metadata"]
        namespace = meta.get("namespace") or "default"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        subject = {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion") if key in meta}
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}.", "namespace": namespace},
            "involvedObject": {"apiVersion": raw["apiVersion"], "kind": raw["kind"], **subject},
            "type": type,
            "reason": reason,
            "message": message[:_EVENT_LIMIT],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self._call("POST", RESOURCES["Event"].path(namespace), body=body)

    async def runner_status(self, pod: Raw, port: int) -> Raw | None:
        """Return what the runner in ``pod`` says about its ranks, or None when it does not answer."""
        address = pod["status"]["podIP"]
        host = f"[{address}]" if ":" in address else address
        try:
            # Open without a key, also where the app asks for keys; 503 has the same body as 200.
            async with self._http.get(f"http://{host}:{port}/readyz") as answer:
                body = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        return body if isinstance(body, dict) else None

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Raw | None = None,
        content_type: str = "application/json",
        *,
        missing: Any = ...,
    ) -> Any:
        """One call. ``missing``: what a 404 gives; without it a 404 is a Conflict: the object is gone."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._api.call_api(*request)
                data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError, ApiException) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from None
        status = int(answer.status)
        if status < 300:
            return json.loads(data) if data else None
        if status == 404 and missing is not ...:
            return missing
        raise _error(status, f"{method} {path}", data, answer.getheaders() or {})


def _error(status: int, call: str, data: bytes, headers: Mapping[str, str]) -> ClusterError:
    """The answer of an API server as an error of the port."""
    try:
        said = json.loads(data).get("message") or ""
    except (ValueError, AttributeError):
        said = data.decode("utf-8", "replace")[:500]
    words = f"{call}: {said or status}"
    if status in {404, 409}:
        return Conflict(words)
    if status in {401, 403}:
        return Forbidden(words)
    if status == 429:
        after = headers.get("Retry-After", "1")
        return Throttled(words, float(after) if after.isdigit() else 1.0)
    # The API server calls a manifest whose fields have the wrong type an error of its own.
    if status in {400, 413, 415, 422} or (status == 500 and "failed to create typed patch object" in said):
        return Refused(said or words)
    return Unavailable(words)
