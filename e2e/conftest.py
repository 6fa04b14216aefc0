"""One cluster and one operator for all scenarios, a namespace for each test, and no silent skips in CI."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import pins, project, provider
from e2e.cluster.current import CurrentCluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.provider import Cluster
from e2e.cluster.store import Store
from e2e.harness import apps, report
from e2e.harness.client import Client
from e2e.harness.kube import Kube
from e2e.harness.operator import Operator

# A shell ignores SIGINT in what it runs in the background, and so would the programs that are tested with Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Seconds for a scenario, unless it says otherwise: a limit for a busy machine with two cores. Elsewhere the first one also
#: has the images built and brought into every node: the worker's are gigabytes that are copied three times.
TIMEOUT = 600 if os.environ.get("CLUSTER", "local") == "local" else 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each scenario its time-out."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Put the state of a failed scenario's namespace into its report; the namespace is still there."""
    found = yield
    kube = getattr(item, "funcargs", {}).get("kube")
    if found.failed and isinstance(kube, Kube):
        found.sections += report.sections(kube, getattr(item, "funcargs", {}).get("operator"))
    return found


def impossible(reason: str) -> None:
    """Skip, or fail where nobody would read why."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI nothing is skipped: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster that $CLUSTER names. It stays if it ran before, or with E2E_KEEP=1."""
    if reason := provider.obstacle():
        impossible(reason)
    chosen = provider.choose(report=lambda _: None)
    ran = chosen.kubeconfig.exists()
    try:  # whoever interrupts it while it comes up must not be left with half of it
        chosen.up()
        yield chosen
    finally:
        if not ran and not os.environ.get("E2E_KEEP"):
            chosen.down()


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Callable[..., str]:
    """Run kubectl as the administrator: `kubectl("get", "pods", input=...)`."""
    return cluster.kubectl


@contextmanager
def restricted_namespace(kubectl: Callable[..., str]) -> Iterator[str]:
    """A new namespace that only takes pods of the restricted profile."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    kubectl("create", "--filename=-", input=json.dumps(item))
    try:
        # Until the controller manager has made it, pods are refused.
        kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=120s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def namespace(kubectl: Callable[..., str]) -> Iterator[str]:
    """A namespace of the test's own that only takes pods of the restricted profile."""
    with restricted_namespace(kubectl) as name:
        yield name


@pytest.fixture(scope="session")
def probe_image(cluster: Cluster) -> str:
    """An image that answers questions about its pod; it is in every node."""
    if given := os.environ.get("E2E_PROBE_IMAGE"):
        return given
    store = Store()
    store.ensure(["probe"])
    try:
        cluster.load_image(store.image("probe"))
    except ClusterError as error:
        impossible(f"{error}, and set E2E_PROBE_IMAGE to its name there (it is {store.image('probe')})")
    return pins.image_reference("probe")


def _project_image(cluster: Cluster, role: project.Role) -> str:
    try:
        return project.ensure(cluster, role, report=lambda _: None)
    except ClusterError as error:
        if isinstance(cluster, CurrentCluster):
            impossible(str(error))
        raise


@pytest.fixture(scope="session")
def worker_image(cluster: Cluster) -> str:
    """The worker image of this checkout; it is in every node. The first build on a machine takes minutes."""
    return _project_image(cluster, "worker")


@pytest.fixture(scope="session")
def operator_image(cluster: Cluster) -> str:
    """The operator image of this checkout; it is in every node."""
    return _project_image(cluster, "operator")


@pytest.fixture(scope="session")
def operator(cluster: Cluster, operator_image: str, worker_image: str) -> Iterator[Operator]:
    """The operator, installed with the chart. It is removed after the scenarios, but for E2E_KEEP=1."""
    installed = Operator(cluster)
    values = {}
    for key, image in (("image", operator_image), ("workerImage", worker_image)):
        values[f"{key}.repository"], _, values[f"{key}.tag"] = image.rpartition(":")
    installed.install(values)
    yield installed
    if not os.environ.get("E2E_KEEP"):
        installed.uninstall()


@pytest.fixture
def kube(cluster: Cluster, operator: Operator, namespace: str) -> Kube:
    """The test's namespace, with the ConfigMap `code` in it: the scenarios' workers."""
    found = Kube(cluster, namespace)
    found.apply(apps.code())
    return found


@pytest.fixture
def client(kube: Kube, worker_image: str) -> Client:
    """A pod in the test's namespace to call apps from."""
    return Client(kube, worker_image)
