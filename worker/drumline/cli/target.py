"""Which app ``invoke`` and ``stream`` mean, and the client for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drumline.cli.cluster_app import Wanted, wanted
from drumline.client import Client
from drumline.errors import ConfigurationError


@dataclass(frozen=True)
class Connection:
    """How to talk to an app: the options that ``invoke`` and ``stream`` share."""

    namespace: str | None = None
    context: str | None = None
    api_key: str | None = None
    timeout: float | None = None
    retries: int = 0
    cacert: Path | None = None
    insecure: bool = False

    def client(self, url: str) -> Client:
        """Return the client of the app at ``url``."""
        verify = str(self.cacert) if self.cacert is not None else not self.insecure
        return Client(url, api_key=self.api_key, timeout=self.timeout, retries=self.retries, verify=verify)


@contextlib.contextmanager
def client_for(target: str, connection: Connection) -> Iterator[Client]:
    """Yield the client of an app.

    Args:
        target: a URL, or the name of a DistributedApp (``NAME`` or ``NAMESPACE/NAME``).
        connection: the command's options.

    Raises:
        ConfigurationError: ``target`` is neither, or there is no such app.
        ConnectionFailed: the cluster does not answer.
        NotReady: no replica of the app can answer.
    """
    if target.endswith((".py", ".yaml", ".yml")) or Path(target).is_file():
        raise ConfigurationError(
            f"target {target!r} is a file; start it with `drumline run {target}`, then pass its URL"
        )
    app = wanted(target, connection.namespace, connection.context)
    if app is not None:
        with _url_of(app) as url, connection.client(url) as client:
            yield client
        return
    if connection.namespace or connection.context:
        raise ConfigurationError(f"target {target!r} is a URL; --namespace and --context are for names of apps")
    with connection.client(target) as client:
        yield client


@contextlib.contextmanager
def _url_of(app: Wanted) -> Iterator[str]:
    from drumline.cli.forward import forwarded
    from drumline.cli.in_pod import app_url, inside
    from drumline.cli.kubectl import Kubectl, kubeconfigs

    if app.context is None and inside(os.environ) and not kubeconfigs(os.environ):
        yield app_url(app, os.environ)
        return
    kubectl = Kubectl(app.context)
    found, place = kubectl.app(app)
    with forwarded(kubectl, found, str(place)) as url:
        yield url
