"""An API server for the operator's tests: real etcd and kube-apiserver, no controllers (``e2e.cluster.envtest``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import yaml
from e2e.cluster.envtest import EnvTest
from e2e.cluster.errors import ClusterError as NoCluster

from drumline_operator.cluster import Conflict, Unavailable
from drumline_operator.crd import custom_resource_definitions
from drumline_operator.kube import RESOURCES, KubeCluster, Resource, configured

CRD = Resource("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False)


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
