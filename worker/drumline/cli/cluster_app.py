"""A DistributedApp as the command line needs it: its name, where its Service is, and whether it can be called. PURE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drumline.contract import DEFAULT_PORT
from drumline.details import did_you_mean
from drumline.errors import ConfigurationError, NotReady

#: What ``kubectl`` and the API call it.
RESOURCE = "distributedapps.drumline.dev"
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME = re.compile(rf"(?:(?P<namespace>{_LABEL})/)?(?P<name>[a-z]([-a-z0-9]*[a-z0-9])?)")
_SHOWN = 10


@dataclass(frozen=True)
class Wanted:
    """The app that the user named.

    Attributes:
        name: of the DistributedApp.
        namespace: where it is; None: the current one.
        context: of the kubeconfig; None: the current one.
    """

    name: str
    namespace: str | None = None
    context: str | None = None


@dataclass(frozen=True)
class Found:
    """An app that can be called.

    Attributes:
        name: of the DistributedApp and of its Service.
        namespace: where it is.
        port: of the Service.
        url: of the Service, as seen from pods.
    """

    name: str
    namespace: str
    port: int
    url: str


def wanted(target: str, namespace: str | None, context: str | None) -> Wanted | None:
    """Return the app that ``target`` names, ``NAME`` or ``NAMESPACE/NAME``; None when it is something else.

    Raises:
        ConfigurationError: two namespaces are named.
    """
    parts = _NAME.fullmatch(target)
    if parts is None or target == "localhost":
        return None
    within = parts["namespace"]
    if within and namespace and within != namespace:
        raise ConfigurationError(f"target {target!r} is in namespace {within}, --namespace says {namespace}; drop one")
    return Wanted(parts["name"], within or namespace, context)


def found(document: Mapping[str, Any]) -> Found:
    """Return the app that the API server describes.

    Raises:
        NotReady: no replica of it can answer; the message has the reason and the words of its condition Ready.
    """
    meta, spec, status = (document.get(part) or {} for part in ("metadata", "spec", "status"))
    name, namespace = meta["name"], meta["namespace"]
    if not status.get("readyReplicas"):
        ready = next((each for each in status.get("conditions") or () if each.get("type") == "Ready"), None)
        state = ready.get("reason", "") if ready else ""
        why = f"{state}: {ready.get('message', '')}" if ready else "the operator has not looked at it yet; does it run?"
        raise NotReady(f"{namespace}/{name} has no ready replica: {why}", state=state)
    port = int((spec.get("serving") or {}).get("port") or DEFAULT_PORT)
    return Found(name, namespace, port, status.get("url") or service_url(name, namespace, port))


def service_url(name: str, namespace: str, port: int = DEFAULT_PORT) -> str:
    """Return a Service's address inside the cluster, under any cluster domain."""
    return f"http://{name}.{namespace}.svc:{port}"


def not_found(name: str, namespace: str, where: str, others: Iterable[tuple[str, str]]) -> ConfigurationError:
    """Return the error for an app that is not there.

    Args:
        name: what was asked for.
        namespace: where it was looked for.
        where: which cluster, in words.
        others: namespace and name of the apps that there are, as far as they are known.
    """
    known = sorted(set(others))
    here = [each for within, each in known if within == namespace]
    elsewhere = [within for within, each in known if each == name]
    said = f"there is no DistributedApp {name} in namespace {namespace} of {where}"
    if elsewhere:
        said += f"; one of that name is in {_listed(elsewhere)}"
    elif here:
        said += did_you_mean(name, here) or f"; there are {_listed(here)}"
    elif known:
        said += f"; there are {_listed([f'{within}/{each}' for within, each in known])}"
    else:
        said += ", nor any other"
    return ConfigurationError(said)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
