"""A plain asynchronous client of the API server: what the floors are made with, and what sees when something happens."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec
import yaml

#: As many requests at a time as the API server of a small machine is quickest with.
CONNECTIONS = 16
_CALL_SECONDS = 60.0
_WATCH_SECONDS = 3600
_LONGEST_LINE = 4 << 20
_GROUPS = {
    "DistributedApp": "apis/drumline.dev/v1alpha1/{}/distributedapps",
    "MachineType": "apis/drumline.dev/v1alpha1/machinetypes",
    "Deployment": "apis/apps/v1/{}/deployments",
    "Service": "api/v1/{}/services",
    "Pod": "api/v1/{}/pods",
    "PodDisruptionBudget": "apis/policy/v1/{}/poddisruptionbudgets",
    "NetworkPolicy": "apis/networking.k8s.io/v1/{}/networkpolicies",
    "Namespace": "api/v1/namespaces",
    "ServiceAccount": "api/v1/{}/serviceaccounts",
    "ClusterRoleBinding": "apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "CustomResourceDefinition": "apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}
#: What only the operator writes, while nobody touches apps: apps, and their children but for the children's status. (What
#: a MachineType says of its nodes changes with them, and fake nodes come and go where kwok gets no CPU time.)
_OURS = ("distributedapps",)
_CHILDREN = ("deployments", "services", "poddisruptionbudgets", "networkpolicies")
_EVENTS = "/api/v1/events?fieldSelector=reportingComponent%3Ddrumline-operator"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_WRITES = {"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}
_SAMPLE = re.compile(r"^apiserver_request_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Object = Mapping[str, Any]


class ApiError(Exception):
    """The API server refused; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def path_of(kind: str, namespace: str = "", name: str = "") -> str:
    """Return the path of an object, or of all of a kind."""
    path = "/" + _GROUPS[kind].format(f"namespaces/{namespace}" if namespace else "").replace("//", "/")
    return f"{path}/{name}" if name else path


class Api:
    """An API server, as the administrator of a kubeconfig with certificates."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._url = cluster["server"].rstrip("/")
        decoded = {key: base64.b64decode(value) for key, value in {**cluster, **user}.items() if key.endswith("-data")}
        self._tls = ssl.create_default_context(cadata=decoded["certificate-authority-data"].decode())
        with tempfile.TemporaryDirectory() as folder:
            for name in ("client-certificate-data", "client-key-data"):
                (Path(folder) / name).write_bytes(decoded[name])
            self._tls.load_cert_chain(Path(folder) / "client-certificate-data", Path(folder) / "client-key-data")

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._http = aiohttp.ClientSession(
            self._url, connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=_LONGEST_LINE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def text(self, path: str) -> str:
        """Return what ``path`` holds."""
        async with self._http.get(path, timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS)) as answer:
            return await answer.text()

    async def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """Make one call and return the object of the answer.

        Raises:
            ApiError: the answer is an error.
        """
        data = None if body is None else msgspec.json.encode(body)
        async with self._http.request(
            method,
            path,
            data=data,
            headers={"Content-Type": content_type, "Accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS),
        ) as answer:
            content = await answer.read()
            if answer.status >= 300:
                raise ApiError(answer.status, f"{method} {path}: {content.decode(errors='replace')[:500]}")
            return msgspec.json.decode(content) if content else None

    async def create(self, manifest: Object) -> Any:
        """Create an object."""
        meta = manifest["metadata"]
        return await self.call("POST", path_of(manifest["kind"], meta.get("namespace", "")), manifest)

    async def create_all(self, manifests: Iterable[Object]) -> None:
        """Create objects, :data:`CONNECTIONS` at a time, in their order."""
        await self.all(self.create(manifest) for manifest in manifests)

    async def all(self, calls: Iterable[Awaitable[Any]]) -> None:
        """Make calls, :data:`CONNECTIONS` at a time, in their order."""
        left = iter(calls)

        async def work() -> None:
            for call in left:
                await call

        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(work())

    async def have(self, manifest: Object) -> None:
        """Create an object unless it is there."""
        try:
            await self.create(manifest)
        except ApiError as error:
            if error.status != 409:
                raise

    @asynccontextmanager
    async def follow(
        self, kind: str, namespace: str, match: Callable[[Object], bool] = lambda _: True, *, whole: bool = False
    ) -> AsyncIterator[Follow]:
        """Follow all objects of a kind.

        Args:
            kind: of the objects.
            namespace: theirs.
            match: which of them count.
            whole: ``match`` looks at more than metadata.
        """
        found = Follow(self, path_of(kind, namespace), match, whole)
        await found.begin()
        task = asyncio.create_task(found.run())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait([task])

    @asynccontextmanager
    async def changes(self, path: str, version: str, accept: str) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a watch."""
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(_WATCH_SECONDS)}
        async with self._http.get(path, params=query, headers={"Accept": accept}) as answer:
            yield answer.content

    async def writes(self) -> Counter[str]:
        """Return how much the operator has written, by verb and resource, as the API server counts it; not its Lease."""
        found: Counter[str] = Counter()
        for text, value in _SAMPLE.findall(await self.text("/metrics")):
            labels = dict(_LABEL.findall(text))
            resource, subresource = labels.get("resource"), labels.get("subresource")
            if labels.get("verb") in _WRITES and (resource in _OURS or (resource in _CHILDREN and not subresource)):
                found[f"{labels['verb']} {resource}/{subresource}".rstrip("/")] += int(float(value))
        async with self._http.get(_EVENTS, headers={"Accept": _METADATA}) as answer:
            found["POST events"] = len(msgspec.json.decode(await answer.read())["items"] or ())
        return found


class Follow:
    """The objects of a kind as they change.

    Attributes:
        matching: names of those that count now.
        objects: all of them, as last seen.
    """

    def __init__(self, api: Api, path: str, match: Callable[[Object], bool], whole: bool) -> None:
        self._api, self._path, self._match = api, path, match
        shape = "" if whole else ";as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
        self._list_type = f"application/json{shape.format('List')}"
        self._watch_type = f"application/json{shape.format('')}"
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._version = ""
        self.matching: set[str] = set()
        self.objects: dict[str, Object] = {}

    async def begin(self) -> None:
        """List what is there."""
        async with self._api._http.get(self._path, headers={"Accept": self._list_type}) as answer:
            document = msgspec.json.decode(await answer.read())
        if answer.status >= 300:
            raise ApiError(answer.status, f"{self._path}: {document.get('message')}")
        self._version = document["metadata"]["resourceVersion"]
        items = {item["metadata"]["name"]: item for item in document["items"] or ()}
        for name in set(self.objects) - set(items):
            self._take("DELETED", self.objects[name])
        for item in items.values():
            self._take("ADDED", item)

    async def run(self) -> None:
        """Take each change, until cancelled."""
        try:
            while True:
                async with self._api.changes(self._path, self._version, self._watch_type) as lines:
                    async for line in lines:
                        event = msgspec.json.decode(line)
                        if event["type"] == "ERROR":
                            break
                        self._take(event["type"], event["object"])
                # The API server ends watches whose reader is slow for a moment, as on a machine that does everything.
                await self.begin()
        except (ApiError, aiohttp.ClientError, ValueError) as error:
            self._failure = error
            self._changed.set()

    def _take(self, type: str, item: Object) -> None:
        name = item["metadata"]["name"]
        if type == "DELETED":
            self.objects.pop(name, None)
            self.matching.discard(name)
        else:
            self.objects[name] = item
            (self.matching.add if self._match(item) else self.matching.discard)(name)
        self._changed.set()

    async def until(self, done: Callable[[Follow], bool], what: str, limit: float) -> float:
        """Return the time (``time.perf_counter``) at which ``done`` held.

        Raises:
            RuntimeError: it did not within ``limit`` seconds, or the watch broke.
        """
        try:
            async with asyncio.timeout(limit):
                while not done(self):
                    if self._failure is not None:
                        raise RuntimeError(f"{what}: {self._failure}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise RuntimeError(
                f"{what}: not within {limit:g} s; {len(self.matching)} of {len(self.objects)} are"
            ) from None
        return time.perf_counter()

    async def count(self, number: int, what: str, limit: float) -> float:
        """Return the time at which ``number`` objects counted."""
        return await self.until(lambda found: len(found.matching) >= number, what, limit)

    async def gone(self, what: str, limit: float) -> float:
        """Return the time at which there were none."""
        return await self.until(lambda found: not found.objects, what, limit)
