"""A real API server that writes down what the operator asks for, and questions about rights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from e2e.cluster.envtest import EnvTest
from e2e.cluster.process import command
from e2e.cluster.waiting import wait_for

from .conftest import NAME, NAMESPACE, Object, program

APPS = "apps"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{NAME}"
#: Who asked for what, and whether it was allowed. Watches end late, so their beginning counts.
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": [ACCOUNT]}, {"level": "None"}],
}
Right = tuple[str, str, str]  # group, resource with subresource, verb


class Server:
    """An API server that writes down what the operator asks for, and kubectl for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.log = folder / "audit.log"
        (folder / "policy.yaml").write_text(yaml.safe_dump(AUDIT))
        self._kubectl = program("kubectl")
        self.api = EnvTest(
            flags=[
                f"--audit-policy-file={folder / 'policy.yaml'}",
                f"--audit-log-path={self.log}",
                # Off by default, on in some distributions: who sets an owner must be allowed to hold up its deletion.
                "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            ]
        )

    def kubectl(self, *arguments: str, items: Iterable[Any] = ()) -> str:
        document = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)})
        stdin = document if items else None
        return command(self._kubectl, *arguments, env=self.api.environment(), input=stdin)

    def apply(self, items: Iterable[Object], *options: str) -> None:
        self.kubectl("apply", "--server-side", "--validate=strict", *options, "--filename=-", items=items)

    def install(self, items: list[Object], denied: Iterable[Object] = ()) -> None:
        """What `helm install` does: definitions first. Ends when the operator has its rights, and those denied no more."""
        definitions = [each for each in items if each["kind"] == "CustomResourceDefinition"]
        if definitions:
            self.apply(definitions)
            names = [f"crd/{each['metadata']['name']}" for each in definitions]
            self.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)
        self.apply([each for each in items if each not in definitions])
        granted = [asked(ACCOUNT, verb, f"{group}/{what}", *place(what)) for group, what, verb in rights(items)]
        self.until(granted, [])
        self.until([], list(denied))

    def until(self, granted: list[Object], denied: list[Object]) -> None:
        """Wait for the authorizer, which hears of a role a little later than who made it."""
        wanted = [True] * len(granted) + [False] * len(denied)
        wait_for("what the roles say", lambda: self.allowed(granted + denied) == wanted, limit=60)

    def requests(self) -> list[Object]:
        """The operator's, since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return [json.loads(line) for line in lines]

    def allowed(self, questions: list[Object]) -> list[bool]:
        """The answers to SubjectAccessReviews."""
        if not questions:
            return []
        items = [{"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": q} for q in questions]
        shown = "--output=go-template={{.status.allowed}} "
        return [each == "true" for each in self.kubectl("create", shown, "--filename=-", items=items).split()]

    def kubeconfig(self) -> Path:
        """Of the operator's service account."""
        path = self._folder / "operator.kubeconfig"
        config = yaml.safe_load(self.api.kubeconfig.read_text())
        token = self.kubectl("create", "token", NAME, f"--namespace={NAMESPACE}").strip()
        for user in config["users"]:
            user["user"] = {"token": token}
        path.write_text(yaml.safe_dump(config))
        return path


def namespace(name: str, profile: str) -> Object:
    labels = {"pod-security.kubernetes.io/enforce": profile}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def node(server: Server, name: str) -> None:
    """A node that says of itself that it is ready."""
    server.apply([{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"gpu": "h100"}}}])
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready"}
    patch = json.dumps({"status": {"conditions": [ready]}})
    server.kubectl("patch", f"node/{name}", "--subresource=status", "--type=merge", f"--patch={patch}")


def rights(items: list[Object], *kinds: str) -> set[Right]:
    """What the operator's roles grant."""
    return {
        (group, resource, verb)
        for each in items
        if each["kind"] in (kinds or ("Role", "ClusterRole")) and each["metadata"]["name"].startswith(NAME)
        for rule in each["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def place(resource: str) -> tuple[str, str]:
    """Namespace and name that the operator asks for."""
    if resource == "leases":
        return NAMESPACE, "drumline-operator"
    return ("", "") if resource.partition("/")[0] in {"nodes", "machinetypes"} else (APPS, "")


def asked(user: str, verb: str, resource: str, place: str = "", name: str = "", groups: Iterable[str] = ()) -> Object:
    """A SubjectAccessReview. ``resource``: group/resource[/subresource]."""
    group, _, rest = resource.partition("/")
    resource, _, subresource = rest.partition("/")
    attributes = {
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "verb": verb,
        "namespace": place,
        "name": name,
    }
    return {"user": user, "groups": list(groups), "resourceAttributes": attributes}
