"""A certificate authority, certificates and kubeconfig files."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .layout import API_PORT, CLUSTER_DOMAIN, Network, Node

#: A test cluster is not meant to live longer.
LIFETIME = datetime.timedelta(days=365)
ADMINISTRATORS = "system:masters"


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


_CA_USAGE: Final = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def _subject(common_name: str, organization: str = "") -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.NoEncryption())


class Authority:
    """Issues certificates into a directory: `<name>.crt` and `<name>.key`, its own as `ca`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._name = _subject("drumline-test-ca")
        self._key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_CA_USAGE, critical=True)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._write("ca", certificate, self._key)

    def issue(self, name: str, common_name: str, organization: str = "", hosts: Sequence[str] = ()) -> None:
        """A certificate for clients and servers.

        Args:
            name: Of the files.
            common_name: The user, to Kubernetes.
            organization: The user's group, to Kubernetes.
            hosts: DNS names and addresses of a server.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        # Python 3.13 takes no certificate that does not say by whose key it was signed.
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = self._builder(_subject(common_name, organization), key).add_extension(usages, critical=False)
        builder = builder.add_extension(signer, critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        self._write(name, builder.sign(self._key, hashes.SHA256()), key)

    def issue_service_account_keys(self) -> None:
        """The pair that signs and checks tokens: `service-account.key`, `service-account.pub`."""
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(self.directory / "service-account.key", _private(key))
        info = serialization.PublicFormat.SubjectPublicKeyInfo
        public = key.public_key().public_bytes(serialization.Encoding.PEM, info)
        (self.directory / "service-account.pub").write_bytes(public)

    def kubeconfig(self, name: str, server: str) -> bytes:
        """A kubeconfig (JSON, which is YAML) with the certificate `name`, all data inside."""

        def data(file: str) -> str:
            return base64.b64encode((self.directory / file).read_bytes()).decode()

        user = {"client-certificate-data": data(f"{name}.crt"), "client-key-data": data(f"{name}.key")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "drumline", "cluster": {"server": server, "certificate-authority-data": data("ca.crt")}}
            ],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "drumline", "context": {"cluster": "drumline", "user": name}}],
            "current-context": "drumline",
        }
        return json.dumps(config, indent=1).encode()

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ a little
            .not_valid_after(now + LIFETIME)
        )

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        (self.directory / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_private(self.directory / f"{name}.key", _private(key))


def api_server_url(network: Network) -> str:
    """Where the API server answers, for pods, nodes and the machine."""
    return f"https://{Node(1, network).address}:{API_PORT}"


def create(directory: Path, kubeconfig: Path, network: Network, nodes: Sequence[Node]) -> None:
    """Everything that the components and the administrator need.

    Args:
        directory: Of certificates, keys and the components' kubeconfig files.
        kubeconfig: The administrator's.
        network: The cluster's addresses.
        nodes: Each gets a certificate for its kubelet.
    """
    authority = Authority(directory)
    service = f"kubernetes.default.svc.{CLUSTER_DOMAIN}"
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", service, "localhost"]
    addresses = ["127.0.0.1", network.api_service, Node(1, network).address]
    authority.issue("apiserver", "kube-apiserver", hosts=[*names, *addresses])
    authority.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", ADMINISTRATORS)
    authority.issue("front-proxy-client", "front-proxy-client")
    users = {"admin": ("admin", ADMINISTRATORS)}
    for component in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        users[component] = (f"system:{component}", "")
    for node in nodes:
        identity = (f"system:node:{node.name}", "system:nodes")
        authority.issue(f"{node.name}-kubelet-server", *identity, hosts=(node.name, node.address))
        users[f"{node.name}-kubelet"] = identity
    for name, (common_name, organization) in users.items():
        authority.issue(name, common_name, organization)
        write_private(directory / f"{name}.kubeconfig", authority.kubeconfig(name, api_server_url(network)))
    authority.issue_service_account_keys()
    write_private(kubeconfig, authority.kubeconfig("admin", api_server_url(network)))
