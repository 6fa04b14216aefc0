"""An API server of its own for the operator's tests: etcd and kube-apiserver from ``KUBEBUILDER_ASSETS``."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOKEN = "operator-tests"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def api_server() -> Iterator[tuple[str, str]]:
    """URL and token of an API server that nobody else uses; it has no controllers."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", ""))
    if not (assets / "kube-apiserver").is_file():
        pytest.skip("no API server: set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "tokens").write_text(f'{_TOKEN},tests,tests,"system:masters"\n')
        subprocess.run(["openssl", "genrsa", "-out", home / "key", "2048"], check=True, capture_output=True)
        client, peer, port = (_free_port() for _ in range(3))
        store = f"http://127.0.0.1:{client}"
        commands = (
            [
                *(assets / "etcd", "--data-dir", home / "etcd", "--unsafe-no-fsync", "--log-level=error"),
                *("--listen-client-urls", store, "--advertise-client-urls", store),
                *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            ],
            [
                *(assets / "kube-apiserver", "--etcd-servers", store, "--secure-port", str(port)),
                *("--bind-address=127.0.0.1", "--cert-dir", home / "certs", "--token-auth-file", home / "tokens"),
                *("--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount"),
                *("--service-account-key-file", home / "key", "--service-account-signing-key-file", home / "key"),
                *("--service-account-issuer=https://tests", "--service-cluster-ip-range=10.250.0.0/16"),
            ],
        )
        processes = []
        try:
            for command in commands:
                with (home / f"{Path(command[0]).name}.log").open("w") as log:
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            yield f"https://127.0.0.1:{port}", _TOKEN
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(timeout=10)
