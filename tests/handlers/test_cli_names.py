"""``drumline invoke NAME`` up to the pod: kubectl and a real API server find the app, or say why not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import Result
from e2e.cluster import pins
from e2e.cluster.envtest import EnvTest
from e2e.cluster.store import Store
from typer.testing import CliRunner

from drumline.cli import app as command_line
from drumline.cli.cluster_app import Wanted
from drumline.cli.in_pod import app_url, inside
from drumline.errors import ConfigurationError, ConnectionFailed, NotReady

pytestmark = [pytest.mark.timeout(240), pytest.mark.linux]
CRDS = Path(__file__).parents[2] / "crds"
KUBECTL_TIMEOUT = 90
Run = Callable[..., Result]
Kubectl = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[EnvTest]:
    store = Store()
    store.ensure(["kubectl", *pins.ENVTEST_PROGRAMS])
    with EnvTest(store) as found:
        yield found


@pytest.fixture(scope="module")
def environment(server: EnvTest) -> dict[str, str]:
    kubectl = Store().program("kubectl").parent
    return {**server.environment(), "PATH": f"{kubectl}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def kubectl(environment: dict[str, str]) -> Kubectl:
    def run(*arguments: str, input: Any = None) -> str:
        text = None if input is None else json.dumps(input)
        done = subprocess.run(
            ["kubectl", *arguments],
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=KUBECTL_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def invoke(*arguments: str, **other: str | None) -> Result:
        env = {**environment, "COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1", "KUBERNETES_SERVICE_HOST": None}
        return CliRunner().invoke(command_line, list(arguments), env={**env, **other})

    return invoke


@pytest.fixture(scope="module")
def apps(kubectl: Kubectl) -> None:
    """Two apps without a status in namespace art, one in default that says why it is not ready."""
    kubectl("apply", "--server-side", "--force-conflicts", f"--filename={CRDS}")
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    kubectl("create", "namespace", "art")
    for namespace, name in (("art", "sdxl"), ("art", "flux"), ("default", "chess")):
        meta = {"name": name, "namespace": namespace}
        spec = {"image": "i:1", "workerClass": "app:W", "serving": {"port": 8090}}
        app = {"apiVersion": "drumline.dev/v1alpha1", "kind": "DistributedApp", "metadata": meta, "spec": spec}
        kubectl("create", "--filename=-", input=app)
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": "InsufficientGPUs",
        "message": "0/2 nodes: 2 Insufficient nvidia.com/gpu",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    write_status(kubectl, "default", "chess", conditions=[condition])


def write_status(kubectl: Kubectl, namespace: str, name: str, **status: Any) -> None:
    patch = json.dumps({"status": status})
    kubectl(
        "patch", "dapp", name, f"--namespace={namespace}", "--subresource=status", "--type=merge", f"--patch={patch}"
    )


def said(result: Result, code: int) -> tuple[str, str]:
    """The error and what to try; nothing else is printed."""
    assert result.exit_code == code, result.output
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("try:   ")
    assert result.stdout == ""
    return error, hint


def test_a_cluster_without_drumline(server: EnvTest, run: Run) -> None:
    with EnvTest(Store()) as empty:
        error, hint = said(run("invoke", "sdxl", KUBECONFIG=str(empty.kubeconfig)), 2)
    assert "context drumline has no drumline" in error
    assert "install" in hint


@pytest.mark.usefixtures("apps")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["sdxl"],
            "no DistributedApp sdxl in namespace default of the cluster of context drumline; one of that name is in art",
        ),
        (["sdxk", "-n", "art"], "did you mean 'sdxl'?"),
        (["art/other"], "there are flux, sdxl"),
        (["empty/other"], "there are art/flux, art/sdxl, default/chess"),
        (["sdxl", "--context", "nope"], "nope"),
    ],
)
def test_an_app_that_is_not_there(run: Run, arguments: list[str], words: str) -> None:
    for command in ("invoke", "stream"):
        error, hint = said(run(command, *arguments), 2)
        assert words in error
        assert "kubectl" in hint


@pytest.mark.usefixtures("apps")
def test_an_app_that_is_not_ready(run: Run) -> None:
    error, hint = said(run("invoke", "chess"), 1)
    assert "default/chess has no ready replica: InsufficientGPUs: 0/2 nodes: 2 Insufficient nvidia.com/gpu" in error
    assert "describe dapp chess" in hint
    assert "wait --for=condition=Ready dapp/chess" in hint
    assert "the operator has not looked at it yet" in said(run("invoke", "art/flux"), 1)[0]


@pytest.mark.usefixtures("apps")
def test_a_service_without_a_way_to_it(run: Run, kubectl: Kubectl) -> None:
    write_status(kubectl, "art", "sdxl", readyReplicas=1)
    error, _ = said(run("invoke", "sdxl", "--namespace", "art"), 1)
    assert 'services "sdxl" not found' in error


@pytest.mark.usefixtures("apps")
def test_somebody_who_may_not_look(run: Run, server: EnvTest, tmp_path: Path) -> None:
    config = json.loads(server.kubeconfig.read_text())
    config["users"][0]["user"]["as"] = "nobody"
    (tmp_path / "config").write_text(json.dumps(config))
    error, hint = said(run("invoke", "sdxl", KUBECONFIG=str(tmp_path / "config")), 2)
    assert 'does not let you: distributedapps.drumline.dev "sdxl" is forbidden: User "nobody"' in error
    assert "role" in hint


def test_no_way_to_a_cluster(run: Run, server: EnvTest, tmp_path: Path) -> None:
    error, hint = said(run("invoke", "sdxl", KUBECONFIG=str(tmp_path / "none")), 2)
    assert f"no kubeconfig: {tmp_path / 'none'} does not exist" in error
    assert "KUBECONFIG" in hint
    error, _ = said(run("invoke", "sdxl", PATH=str(tmp_path)), 2)
    assert "there is none on PATH" in error
    config = json.loads(server.kubeconfig.read_text())
    (tmp_path / "current").write_text(json.dumps({**config, "current-context": ""}))
    assert "no current context" in said(run("invoke", "sdxl", KUBECONFIG=str(tmp_path / "current")), 2)[0]
    config["users"][0]["user"] = {"token": "stale"}
    (tmp_path / "stale").write_text(json.dumps(config))
    assert "does not know you" in said(run("invoke", "sdxl", KUBECONFIG=str(tmp_path / "stale")), 2)[0]
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "away").write_text(json.dumps(config))
    assert "127.0.0.1:9 was refused" in said(run("invoke", "sdxl", KUBECONFIG=str(tmp_path / "away")), 1)[0]


# -- inside a pod


@pytest.fixture
def pod(server: EnvTest, kubectl: Kubectl, apps: None, tmp_path: Path) -> Callable[[str], tuple[dict[str, str], Path]]:
    """What a pod with that service account of namespace art finds."""

    def make(account: str) -> tuple[dict[str, str], Path]:
        config = json.loads(server.kubeconfig.read_text())
        authority = config["clusters"][0]["cluster"]["certificate-authority-data"]
        (tmp_path / "ca.crt").write_bytes(base64.b64decode(authority))
        kubectl("create", "serviceaccount", account, "--namespace=art")
        (tmp_path / "token").write_text(kubectl("create", "token", account, "--namespace=art"))
        (tmp_path / "namespace").write_text("art")
        address = urlsplit(server.url)
        assert address.hostname
        found = {"KUBERNETES_SERVICE_HOST": address.hostname, "KUBERNETES_SERVICE_PORT": str(address.port)}
        assert inside(found)
        return found, tmp_path

    return make


def test_a_pod_with_rights_asks_for_the_address(pod: Any, kubectl: Kubectl) -> None:
    found, account = pod("reader")
    kubectl("create", "clusterrole", "app-reader", "--verb=get,list", "--resource=distributedapps.drumline.dev")
    kubectl("create", "clusterrolebinding", "app-reader", "--clusterrole=app-reader", "--serviceaccount=art:reader")
    write_status(kubectl, "art", "sdxl", readyReplicas=1)
    assert app_url(Wanted("sdxl"), found, account) == "http://sdxl.art.svc:8090"
    write_status(kubectl, "art", "sdxl", readyReplicas=1, url="http://sdxl.art.svc.example:8090")
    assert app_url(Wanted("sdxl"), found, account) == "http://sdxl.art.svc.example:8090"
    with pytest.raises(NotReady, match="InsufficientGPUs"):
        app_url(Wanted("chess", "default"), found, account)
    with pytest.raises(ConfigurationError, match="did you mean 'sdxl'"):
        app_url(Wanted("sdxk"), found, account)
    (account / "token").write_text("stale")
    assert app_url(Wanted("sdxl"), found, account) == "http://sdxl.art.svc:8080"
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9"):
        app_url(Wanted("sdxl"), {**found, "KUBERNETES_SERVICE_PORT": "9"}, account)


def test_a_pod_without_rights_takes_the_usual_address(pod: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found, account = pod("nobody")
    assert app_url(Wanted("sdxl"), found, account) == "http://sdxl.art.svc:8080"
    assert app_url(Wanted("chess", "default"), found, account) == "http://chess.default.svc:8080"
    assert "may not read DistributedApps" in capsys.readouterr().err


def test_a_pod_without_an_account_takes_the_usual_address(tmp_path: Path) -> None:
    assert app_url(Wanted("sdxl"), {}, tmp_path) == "http://sdxl:8080"
    assert app_url(Wanted("sdxl", "art"), {}, tmp_path) == "http://sdxl.art.svc:8080"
    assert not inside({})
