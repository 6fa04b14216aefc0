"""Finding an app from inside a pod: the Service is right there, and the API server tells its port if we may ask."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drumline.cli.cluster_app import RESOURCE, Wanted, found, not_found, service_url
from drumline.cli.output import State, note
from drumline.contract import DEFAULT_PORT
from drumline.errors import ConfigurationError, ConnectionFailed

#: Where Kubernetes puts a pod's token, the API server's authority and the namespace.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SECONDS = 15.0


def inside(environment: Mapping[str, str]) -> bool:
    """Whether this process runs in a pod."""
    return bool(environment.get("KUBERNETES_SERVICE_HOST"))


def app_url(app: Wanted, environment: Mapping[str, str], account: Path = ACCOUNT) -> str:
    """Return the address of the app's Service.

    Without a service account, or without its right to read DistributedApps, which a pod does not have by itself, that is
    its usual address.

    Raises:
        ConfigurationError: there is no such app.
        ConnectionFailed: the API server does not answer.
        NotReady: no replica of it can answer.
    """
    if not (account / "token").is_file():
        # A name alone is looked for in the pod's own namespace.
        return service_url(app.name, app.namespace) if app.namespace else f"http://{app.name}:{DEFAULT_PORT}"
    namespace = app.namespace or (account / "namespace").read_text().strip()
    group = RESOURCE.partition(".")[2]
    path = f"/apis/{group}/v1alpha1/namespaces/{namespace}/distributedapps"
    status, document = _get(f"{path}/{app.name}", environment, account)
    if status in {401, 403}:
        url = service_url(app.name, namespace)
        note(f"this pod may not read DistributedApps; trying {url}")
        return url
    if status == 404 and (document.get("details") or {}).get("name") != app.name:
        State.hint = "install drumline there (docs/guide/installing.md)"
        raise ConfigurationError("this cluster has no drumline: it does not know DistributedApps")
    if status == 404:
        listed = _get(path, environment, account)[1].get("items") or ()
        names = [(each["metadata"]["namespace"], each["metadata"]["name"]) for each in listed]
        State.hint = "NAMESPACE/NAME for an app of another namespace"
        raise not_found(app.name, namespace, "this cluster", names)
    if status != 200:
        raise ConnectionFailed(f"the API server answered {status}: {document.get('message') or 'nothing'}")
    return found(document).url


def _get(path: str, environment: Mapping[str, str], account: Path) -> tuple[int, dict[str, Any]]:
    import httpx2

    host, port = environment["KUBERNETES_SERVICE_HOST"], environment.get("KUBERNETES_SERVICE_PORT") or "443"
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}{path}"
    # The token is read for every call: the kubelet renews it.
    headers = {"authorization": f"Bearer {(account / 'token').read_text().strip()}"}
    verify = ssl.create_default_context(cafile=str(account / "ca.crt"))
    # Python 3.13 refuses authorities that kubectl takes, and that older clusters have.
    verify.verify_flags &= ~ssl.VERIFY_X509_STRICT
    try:
        with httpx2.Client(verify=verify, timeout=_SECONDS, trust_env=False) as client:
            answer = client.get(url, headers=headers)
            document = answer.json() if answer.content else {}
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise ConnectionFailed(f"the API server at {host}:{port}: {error}") from None
    return answer.status_code, document if isinstance(document, dict) else {}
