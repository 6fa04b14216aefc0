"""An API server for the operator's tests: real etcd and kube-apiserver, no controllers (``e2e.cluster.envtest``)."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.cluster.envtest import EnvTest
from e2e.cluster.errors import ClusterError as NoCluster
from e2e.cluster.layout import CHECKOUT
from tests.handlers.harness import Operator, Start

from drumline_operator.cluster import Conflict, Unavailable
from drumline_operator.crd import custom_resource_definitions
from drumline_operator.kube import RESOURCES, KubeCluster, Resource, configured

CRD = Resource("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False)

NAMESPACE = Resource("/api/v1", "namespaces", namespaced=False)


@pytest.fixture(scope="session")
def bare_server() -> Iterator[EnvTest]:
    """An API server of this test run alone."""
    server = EnvTest()
    try:
        server.__enter__()
    except NoCluster as error:
        pytest.skip(f"no API server: {error}; `make handlers` builds what is needed, or set KUBEBUILDER_ASSETS")
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(bare_server: EnvTest) -> EnvTest:
    """The same, with our CRDs."""
    asyncio.run(install(bare_server))
    return bare_server


@pytest.fixture(autouse=True)
async def connections_end() -> AsyncIterator[None]:
    """Ends a test's event loop only when its connections have ended.

    A TLS connection that is given up in the middle of its handshake, as a task that is cancelled does, closes its socket
    some turns of the event loop later (asyncio, all versions so far); a loop that ends before that leaves it open.
    """
    loop: Any = asyncio.get_running_loop()
    before = len(loop._selector.get_map())
    yield
    async with asyncio.timeout(10):
        while len(loop._selector.get_map()) > before:  # noqa: ASYNC110 - the end of a handshake tells nobody
            await asyncio.sleep(0.005)


@pytest.fixture
async def cluster(server: EnvTest) -> AsyncIterator[KubeCluster]:
    """The operator's own client, as administrator."""
    async with KubeCluster(await configured(server.kubeconfig)) as found:
        yield found


async def install(server: EnvTest) -> None:
    """Make the CRDs, and wait until they are served."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RESOURCES, "CustomResourceDefinition", CRD)
        async with KubeCluster(await configured(server.kubeconfig)) as cluster, asyncio.timeout(60):
            while not await established(cluster):  # noqa: ASYNC110 - nothing announces that a kind is served
                await asyncio.sleep(0.05)


async def established(cluster: KubeCluster) -> bool:
    try:
        for text in custom_resource_definitions().values():
            document = yaml.safe_load(text)
            await cluster.apply(document)
            live = await cluster.get("CustomResourceDefinition", None, document["metadata"]["name"])
            conditions = {each["type"]: each for each in (live or {}).get("status", {}).get("conditions") or ()}
            if conditions.get("Established", {}).get("status") != "True":
                return False
            assert "NonStructuralSchema" not in conditions
        await cluster.list("MachineType", None)
        await cluster.list("DistributedApp", "default")
    except Unavailable:
        return False
    except Conflict as error:  # served a moment after it is established
        assert "could not find the requested resource" in str(error) or "404" in str(error)
        return False
    return True


@pytest.fixture
async def start(server: EnvTest) -> AsyncIterator[Start]:
    """Starts operators; each test has namespaces of its own, so that they do not see each other's apps."""
    started: list[Operator] = []

    async def start(*, kubeconfig: Path | None = None, **settings: object) -> Operator:
        given = {
            "BIND": "127.0.0.1:0",
            "LOG_FORMAT": "json",
            "NAMESPACE": "default",
            "LEADER_ELECTION": False,
            **settings,
        }
        # Each start would compile all libraries anew where byte code is not written.
        ambient = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        ambient["PYTHONPYCACHEPREFIX"] = str(CHECKOUT / ".cache" / "byte-code")
        environment = {f"DRUMLINE_OPERATOR_{name}": str(value) for name, value in given.items()}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "drumline_operator"),
            env={**ambient, **environment, "KUBECONFIG": str(kubeconfig or server.kubeconfig)},
            stdout=asyncio.subprocess.PIPE,
        )
        started.append(Operator(process))
        line = await started[-1].says("serves port")
        started[-1].url = f"http://127.0.0.1:{line['message'].rpartition(' ')[2]}"
        return started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:
            each.process.kill()
        await each.stop(signal.SIGKILL)


@pytest.fixture
async def namespace(cluster: KubeCluster, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A namespace of this test alone."""
    monkeypatch.setitem(RESOURCES, "Namespace", NAMESPACE)
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:50].strip("-")
    await cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name
