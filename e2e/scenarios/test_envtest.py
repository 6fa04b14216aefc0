"""etcd and the API server alone: side by side, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.cluster import envtest
from e2e.cluster.envtest import EnvTest
from e2e.cluster.errors import ClusterError
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.process import command
from e2e.cluster.store import Store

LINE = [sys.executable, "-m", "e2e.cluster", "envtest"]


@pytest.fixture(scope="module", autouse=True)
def kubectl() -> str:
    """The pinned kubectl; also makes sure that nothing is built while a test waits."""
    store = Store(report=lambda _: None)
    envtest.programs(store)
    store.ensure(["kubectl"])
    return str(store.program("kubectl"))


def test_two_side_by_side_know_nothing_of_each_other(kubectl: str) -> None:
    with EnvTest() as first:
        with EnvTest() as second:
            for server, name in ((first, "one"), (second, "two")):
                command(kubectl, "create", "namespace", name, env=server.environment())
            listed = command(kubectl, "get", "namespaces", "--output=name", env=first.environment())
            assert "namespace/one" in listed.split()
            assert "namespace/two" not in listed.split()
            places = [first.kubeconfig.parent, second.kubeconfig.parent]
        with pytest.raises(ClusterError, match="refused"):
            command(kubectl, "get", "namespaces", f"--server={second.url}", env=first.environment())
    assert not any(place.exists() for place in places)


def test_pods_are_accepted_without_service_accounts(kubectl: str) -> None:
    with EnvTest() as server:
        command(kubectl, "run", "x", "--image=x", env=server.environment())
        assert command(kubectl, "get", "pods", "--output=name", env=server.environment()) == "pod/x\n"


def test_assets_that_do_not_work_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver"):
        (tmp_path / name).write_text("#!/bin/sh\necho $0 is broken >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(ClusterError, match=r"(?s)ended:\n.* is broken"), EnvTest():
        pass


def test_a_command_runs_with_a_kubeconfig_and_gives_its_status(kubectl: str) -> None:
    script = f"{kubectl} get --raw /readyz; exit 7"
    result = subprocess.run(
        [*LINE, "--", "sh", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 7
    assert result.stdout.endswith("\nok")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_runs_on(number: signal.Signals) -> None:
    said = ""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(LINE, cwd=CHECKOUT, stdout=subprocess.PIPE, start_new_session=True)
        )
        stack.callback(process.kill)  # or leaving this block would wait for one that did not end
        assert process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while "Ctrl-C" not in said:
                more = os.read(process.stdout.fileno(), 4096) if selector.select(120) else b""
                if not more:
                    pytest.fail(f"it did not get ready, and said: {said}")
                said += more.decode()
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) == 2
        watched = [os.pidfd_open(pid) for pid in children]
        os.kill(process.pid, number)
        process.wait(60)
    with selectors.DefaultSelector() as selector:
        for descriptor in watched:  # readable when the process has ended
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            events = selector.select(60)
            assert events, "etcd or the API server runs on"
            for key, _ in events:
                selector.unregister(key.fileobj)
                os.close(key.fd)
    (kubeconfig,) = re.findall(r"KUBECONFIG=(\S+)", said)
    place = Path(kubeconfig).parent
    assert place.exists() == (number == signal.SIGKILL)  # then there was nobody to remove the files
    if place.exists():
        command("rm", "-r", place)
