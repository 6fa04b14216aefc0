"""A real API server, for the tests of the custom resources."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.cluster.envtest import EnvTest
from e2e.cluster.pins import ENVTEST_PROGRAMS
from e2e.cluster.process import command
from e2e.cluster.store import Store

CRDS = Path(__file__).parents[2] / "crds"


@pytest.fixture(scope="session")
def kubectl() -> Path:
    """The pinned kubectl, or the one in ``$KUBEBUILDER_ASSETS``."""
    store, assets = Store(), os.environ.get("KUBEBUILDER_ASSETS")
    programs = ["kubectl"] if assets else [*ENVTEST_PROGRAMS, "kubectl"]
    found = Path(assets or "") / "kubectl" if assets else store.program("kubectl")
    if not found.exists() or (not assets and store.missing(programs)):
        pytest.skip(
            f"no API server: `python -m e2e.cluster build {' '.join([*ENVTEST_PROGRAMS, 'kubectl'])}` builds it once, "
            "or set KUBEBUILDER_ASSETS to a folder that has these three"
        )
    return found


@pytest.fixture(scope="session")
def api_server(kubectl: Path) -> Iterator[EnvTest]:
    """etcd and a real API server with our CustomResourceDefinitions, for all tests of a session; no controllers."""
    with EnvTest() as server:
        command(kubectl, "apply", "-f", CRDS, env=server.environment())
        wait = ("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        command(kubectl, *wait, env=server.environment())
        yield server
