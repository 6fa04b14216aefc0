"""Certificates."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from e2e.cluster import pki
from e2e.cluster.layout import Network, Node

NETWORK = Network(99)
NODES = [Node(1, NETWORK), Node(2, NETWORK)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    pki.create(directory / "pki", directory / "kubeconfig", NETWORK, NODES)
    return directory


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(subject: x509.Name) -> tuple[object, object]:
    organizations = [attribute.value for attribute in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    return subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value, next(iter(organizations), "")


def test_every_certificate_is_of_our_authority_and_fits_its_key(made: Path) -> None:
    authority = certificate(made / "pki" / "ca.crt")
    found = sorted((made / "pki").glob("*.crt"))
    assert len(found) == 12
    for path in found:
        issued = certificate(path)
        issued.verify_directly_issued_by(authority)
        key = serialization.load_pem_private_key(path.with_suffix(".key").read_bytes(), None)
        assert key.public_key() == issued.public_key()


@pytest.mark.parametrize(
    ("name", "user", "group"),
    [
        ("admin", "admin", "system:masters"),
        ("node-2-kubelet", "system:node:node-2", "system:nodes"),
        ("kube-scheduler", "system:kube-scheduler", ""),
    ],
)
def test_users_are_who_kubernetes_expects(made: Path, name: str, user: str, group: str) -> None:
    assert names(certificate(made / "pki" / f"{name}.crt").subject) == (user, group)


def test_the_api_server_is_known_by_all_its_names(made: Path) -> None:
    issued = certificate(made / "pki" / "apiserver.crt")
    extension = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "kubernetes.default.svc" in extension.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in extension.get_values_for_type(x509.IPAddress)}
    assert {NETWORK.api_service, NODES[0].address, "127.0.0.1"} <= addresses


def test_the_kubeconfig_has_everything_inside(made: Path) -> None:
    config = json.loads((made / "kubeconfig").read_text())
    assert config["clusters"][0]["cluster"]["server"] == f"https://{NODES[0].address}:6443"
    user = config["users"][0]["user"]
    assert base64.b64decode(user["client-certificate-data"]) == (made / "pki" / "admin.crt").read_bytes()


def test_nobody_else_can_read_private_files(made: Path) -> None:
    private = [*(made / "pki").glob("*.key"), *(made / "pki").glob("*.kubeconfig"), made / "kubeconfig"]
    assert len(private) > 15
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE((made / "pki").stat().st_mode) == 0o700


def test_tokens_are_signed_with_their_own_key(made: Path) -> None:
    private = serialization.load_pem_private_key((made / "pki" / "service-account.key").read_bytes(), None)
    public = serialization.load_pem_public_key((made / "pki" / "service-account.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert public != certificate(made / "pki" / "ca.crt").public_key()


def test_the_strictest_client_takes_the_api_server(made: Path) -> None:
    """Python 3.13 is as strict as this by default, OpenSSL's way to be so."""
    client = ssl.create_default_context(cafile=str(made / "pki" / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "pki" / "apiserver.crt", made / "pki" / "apiserver.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="kubernetes.default.svc")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [ours, theirs, ours]  # hello, its answer, our verdict on it
    for side in waiting:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert ours.version() == "TLSv1.3"
