"""The port to the cluster over the Kubernetes client: the only module that knows it.

Paths are written down rather than discovered: the operator uses ten kinds, and starts without reading the whole API.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from drumline.api.v1alpha1 import GROUP
from drumline.errors import ConfigurationError
from drumline_operator import answers
from drumline_operator.cluster import Raw, Refused, Unavailable
from drumline_operator.manifests.names import FIELD_MANAGER
from drumline_operator.reflector import Page, Watched
from drumline_operator.runner_client import RunnerClient
from drumline_operator.takeover import take_over


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
    "Lease": Resource("/apis/coordination.k8s.io/v1", "leases"),
}
_PAGE: Final = 500
#: A version that no object ever has, etcd's before its first write: an apply to an object with another one is a conflict.
_NEVER: Final = "1"
_APPLY: Final = "application/apply-patch+yaml"
_JSON_PATCH: Final = "application/json-patch+json"
#: Kubernetes' own limit of an event's message.
_EVENT_LIMIT: Final = 1024
#: An API server ends a watch after this many seconds, a little differently each time, and is silent for at most a
#: minute: then it sends a bookmark.
_WATCH_SECONDS: Final = 290
_SILENCE: Final = 75.0
_JSON: Final = "application/json"
#: Of these only the metadata is asked for: their content is read when it matters.
_METADATA_ONLY: Final = {"ConfigMap": "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"}


class KubeCluster:
    """A :class:`drumline_operator.cluster.Cluster`, and a :class:`drumline_operator.reflector.Source`.

    Args:
        configuration: where the API server is; None: the pod's service account, else the kubeconfig's current context.
        timeout: seconds that one call may take.
        wrote: gets the HTTP method of each call that may change something, but for Leases.
    """

    def __init__(
        self,
        configuration: Configuration | None = None,
        timeout: float = 15.0,
        wrote: Callable[[str], None] = lambda method: None,
    ) -> None:
        self._configuration, self._timeout, self._wrote = configuration, timeout, wrote

    async def __aenter__(self) -> Self:
        if self._configuration is None:
            self._configuration = await configured()
        # Only the client's TLS and credentials are used: its own calls take three times as long.
        tls = RESTClientObject(self._configuration).ssl_context
        # The environment is asked for a proxy once: `trust_env` would ask it, in a thread, for each call.
        self._api = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls), proxy=self._configuration.proxy or _proxy(self._host)
        )
        self._runners = await RunnerClient().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._runners.close()
        finally:  # cancelled, too
            await self._api.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """Return an object, or None when there is none."""
        data = await self.read(kind, namespace, name)
        found: Raw | None = None if data is None else json.loads(data)
        return found

    async def read(self, kind: str, namespace: str | None, name: str) -> bytes | None:
        """Return an object as JSON, or None when there is none."""
        found: bytes | None = await self._call("GET", RESOURCES[kind].path(namespace, name), missing=None)
        return found

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> Sequence[Raw]:
        """Return all objects of a kind that carry the labels of ``selector``."""
        found: list[Raw] = []
        token = ""
        while True:
            page = await self._page(kind, namespace, selector, token, _JSON)
            found += (json.loads(bytes(item)) for item in page.items)
            token = page.token
            if not token:
                return found

    async def page(self, kind: str, namespace: str | None, selector: str, token: str) -> Page:
        """Return one part of a list; of ConfigMaps only the metadata."""
        return await self._page(kind, namespace, selector, token, _METADATA_ONLY.get(kind, "").format("List") or _JSON)

    async def _page(self, kind: str, namespace: str | None, selector: str, token: str, accept: str) -> Page:
        query = {"limit": str(_PAGE), **({"labelSelector": selector} if selector else {})}
        if token:
            query["continue"] = token
        data = await self._call("GET", RESOURCES[kind].path(namespace), query, accept=accept)
        found = answers.listed(data)
        return Page(found.items or (), found.metadata.resourceVersion, found.metadata.continue_)

    async def watch(self, kind: str, namespace: str | None, selector: str, version: str) -> AsyncIterator[Watched]:
        """Yield what happens after ``version``; ends when the API server ends it, or is silent for long."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(random.randint(_WATCH_SECONDS, _WATCH_SECONDS * 5 // 4)),  # noqa: S311
            **({"labelSelector": selector} if selector else {}),
        }
        path = RESOURCES[kind].path(namespace)
        accept = _METADATA_ONLY.get(kind, "").format("") or _JSON
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=_SILENCE)
        try:
            async with self._api.get(
                f"{self._host}{path}?{urlencode(query)}", headers=await self._headers(accept), timeout=limits
            ) as answer:
                if answer.status != 200:
                    raise answers.error(answer.status, f"watch {path}", await answer.read(), answer.headers)
                rest = b""
                try:
                    async for chunk in answer.content.iter_any():
                        *lines, rest = (rest + chunk).split(b"\n")
                        for text in lines:
                            if text.strip():
                                yield answers.event(text, path)
                except TimeoutError:
                    # Nothing is wrong: an API server sends no bookmarks of a kind that nothing has happened to since its
                    # own start, such as nodes where there are none. Or the connection is dead: the next call will tell.
                    return
        except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise Unavailable(f"watch {path}: {type(error).__name__}: {error}") from None

    async def apply(self, manifest: Raw) -> bytes:
        """Make an object be like ``manifest``; return it as it then is. Of a child, what others have changed gives way.

        Raises:
            Refused: the API server does not take ``manifest``.
        """
        try:
            return await self._apply(manifest)
        except Refused as refusal:
            await take_over(self, manifest, refusal)
            return await self._apply(manifest)

    async def make(self, manifest: Raw) -> bytes:
        """Make an object by an apply that changes none that is there; return it.

        Raises:
            Conflict: it is there.
        """
        return await self._apply({**manifest, "metadata": {**manifest["metadata"], "resourceVersion": _NEVER}})

    async def _apply(self, manifest: Raw) -> bytes:
        meta = manifest["metadata"]
        path = RESOURCES[manifest["kind"]].path(meta.get("namespace"), meta["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return bytes(await self._call("PATCH", path, query, manifest, _APPLY))

    async def patch(self, kind: str, namespace: str | None, name: str, operations: Sequence[Raw]) -> Raw:
        """Change an object by a JSON patch; return it as it then is."""
        path = RESOURCES[kind].path(namespace, name)
        answer = await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER}, operations, _JSON_PATCH)
        found: Raw = json.loads(answer)
        return found

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, orphan: bool = False) -> bytes | None:
        """Delete an object if it has this uid; one that is gone already is no error. ``orphan``: what it owns stays.

        Returns:
            The object, when it stays for a while yet, or a Status; None when it was gone.
        """
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Orphan" if orphan else "Background"}
        found: bytes | None = await self._call("DELETE", RESOURCES[kind].path(namespace, name), body=body, missing=None)
        return found

    async def set_status(self, raw: Raw, status: Raw) -> bytes:
        """Write the status of ``raw``, if nobody has changed it since; the API server ignores a uid here."""
        meta = raw["metadata"]
        body = {
            "apiVersion": raw["apiVersion"],
            "kind": raw["kind"],
            "metadata": {key: meta[key] for key in ("name", "namespace", "resourceVersion") if key in meta},
            "status": status,
        }
        path = RESOURCES[raw["kind"]].path(meta.get("namespace"), meta["name"], "status")
        return bytes(await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER, "force": "true"}, body, _APPLY))

    async def event(self, raw: Raw, type: str, reason: str, message: str, at: datetime | None = None) -> None:
        """Attach an event to ``raw``; ``at``: when it happened, if that is not now."""
        meta = raw["metadata"]
        namespace = meta.get("namespace") or "default"
        now = (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
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

    async def pod_warnings(self, namespace: str, uid: str) -> Sequence[Raw]:
        """Return the Warning events about a pod, from all that are still kept."""
        query = {"fieldSelector": f"involvedObject.uid={uid},type=Warning", "limit": str(_PAGE)}
        found: list[Raw] = json.loads(await self._call("GET", RESOURCES["Event"].path(namespace), query))["items"]
        return found

    async def runner_status(self, pod: Raw, port: int) -> Raw | None:
        """Return what the runner in ``pod`` says about its ranks, or None when it does not answer."""
        return await self._runners.runner_news(pod["status"]["podIP"], port, None)

    async def create(self, manifest: Raw) -> Raw:
        """Make an object that is not there yet.

        Raises:
            Conflict: it is there.
        """
        path = RESOURCES[manifest["kind"]].path(manifest["metadata"].get("namespace"))
        found: Raw = json.loads(await self._call("POST", path, {"fieldManager": FIELD_MANAGER}, manifest))
        return found

    async def replace(self, manifest: Raw) -> Raw:
        """Write a whole object.

        Raises:
            Conflict: it is gone, or has another resourceVersion than ``manifest``.
        """
        meta = manifest["metadata"]
        path = RESOURCES[manifest["kind"]].path(meta.get("namespace"), meta["name"])
        found: Raw = json.loads(await self._call("PUT", path, {"fieldManager": FIELD_MANAGER}, manifest))
        return found

    @property
    def _host(self) -> str:
        assert self._configuration is not None
        return str(self._configuration.host).rstrip("/")

    async def _headers(self, accept: str) -> dict[str, str]:
        assert self._configuration is not None
        # Asked every time: a service account's token is a new one every hour.
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        headers = {"Accept": accept, "User-Agent": FIELD_MANAGER}
        if token:
            headers["Authorization"] = token
        return headers

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Raw | Sequence[Raw] | None = None,
        content_type: str = _JSON,
        *,
        accept: str = _JSON,
        missing: Any = ...,
    ) -> Any:
        """One call. ``missing``: what a 404 gives; without it a 404 is a Conflict: the object is gone."""
        if method != "GET" and not path.startswith(RESOURCES["Lease"].base):
            self._wrote(method)
        headers = await self._headers(accept)
        if body is not None:
            headers["Content-Type"] = content_type
        url = f"{self._host}{path}?{urlencode(query)}" if query else f"{self._host}{path}"
        text = None if body is None else msgspec.json.encode(body)
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._api.request(method, url, data=text, headers=headers) as answer,
            ):
                data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from None
        if answer.status < 300:
            return data
        if answer.status == 404 and missing is not ...:
            return missing
        raise answers.error(answer.status, f"{method} {path}", data, answer.headers)


async def configured(kubeconfig: Path | None = None) -> Configuration:
    """Return where the API server is: the pod's service account, else the kubeconfig's current context.

    Args:
        kubeconfig: use this file, and no service account.

    Raises:
        ConfigurationError: there is neither.
    """
    found = Configuration()
    found.disable_strict_ssl_verification = True  # Python 3.13 refuses authorities that kubectl takes
    try:
        if kubeconfig is not None:
            raise config.ConfigException
        config.load_incluster_config(client_configuration=found)
    except config.ConfigException:
        try:
            await config.load_kube_config(str(kubeconfig) if kubeconfig else None, client_configuration=found)
        except (config.ConfigException, OSError, ValueError) as error:
            raise ConfigurationError(
                f"no Kubernetes: there is no service account, and the kubeconfig does not help: {error}; set KUBECONFIG"
            ) from None
    return found


async def credentials() -> Mapping[str, Any]:
    """Return where the API server is and how to get in, by the names that kopf gives these fields."""
    found = await configured()
    scheme, _, secret = (await found.get_api_key_with_prefix("BearerToken") or "").partition(" ")
    return {
        "server": found.host,
        "ca_path": found.ssl_ca_cert,
        "insecure": not found.verify_ssl,
        "certificate_path": found.cert_file,
        "private_key_path": found.key_file,
        "username": found.username or None,
        "password": found.password or None,
        "scheme": scheme or None,
        "token": secret or None,
        "proxy_url": found.proxy,
    }


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment names for ``url``, or None."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    return None if proxy_bypass(host or "") else getproxies().get(scheme)
