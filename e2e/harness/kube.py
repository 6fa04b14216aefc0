"""kubectl in one namespace, and waits that follow a watch instead of asking again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import urllib3
from e2e.cluster.errors import ClusterError
from e2e.cluster.provider import Cluster
from e2e.cluster.waiting import wait_for
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import load_kube_config

Object = dict[str, Any]
Objects = Mapping[str, Object]

#: Seconds that a wait may take unless it says otherwise: for a pod with torch on a busy machine with two cores.
LIMIT: Final = 180.0
#: Where the API has the kinds that scenarios follow; True where they lie in a namespace.
PATHS: Final = {
    "clusterrole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles", False),
    "configmap": ("/api/v1", "configmaps", True),
    "crd": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "dapp": ("/apis/drumline.dev/v1alpha1", "distributedapps", True),
    "deployment": ("/apis/apps/v1", "deployments", True),
    "event": ("/api/v1", "events", True),
    "lease": ("/apis/coordination.k8s.io/v1", "leases", True),
    "mt": ("/apis/drumline.dev/v1alpha1", "machinetypes", False),
    "node": ("/api/v1", "nodes", False),
    "pdb": ("/apis/policy/v1", "poddisruptionbudgets", True),
    "pod": ("/api/v1", "pods", True),
    "replicaset": ("/apis/apps/v1", "replicasets", True),
    "service": ("/api/v1", "services", True),
}


class TooLate(AssertionError):
    """What was waited for did not come in time."""


class Kube:
    """One namespace of a cluster, as its administrator.

    Args:
        cluster: The cluster.
        namespace: Where kubectl works, and where objects are followed.
    """

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self._api: ApiClient | None = None

    def within(self, namespace: str) -> Kube:
        """The same cluster, another namespace."""
        other = Kube(self.cluster, namespace)
        other._api = self._api
        return other

    def __call__(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl in the namespace and return what it prints.

        Raises:
            ClusterError: It failed; the message has its words.
        """
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, input=input)

    def apply(self, *items: Mapping[str, Any]) -> None:
        """`kubectl apply` of objects."""
        self("apply", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def get(self, kind: str, name: str) -> Object:
        """One object.

        Raises:
            ClusterError: There is none.
        """
        found: Object = json.loads(self("get", kind, name, "--output=json"))
        return found

    def raw(self, path: str, limit: float = LIMIT) -> str:
        """What is answered at a path of the API, such as a Service's proxy, which knows its pods a moment after they are ready.

        Raises:
            ClusterError: Nothing was in time; the message has the last error.
        """
        answers: list[str] = []
        problem = ""

        def answered() -> bool:
            nonlocal problem
            try:
                answers.append(self("get", f"--raw={path}"))
            except ClusterError as error:
                problem = str(error)
            return bool(answers)

        wait_for(f"an answer at {path}", answered, limit=limit, explain=lambda: problem)
        return answers[0]

    def list(self, kind: str, selector: str = "") -> list[Object]:
        """All objects of a kind that carry the labels of `selector`."""
        found: list[Object] = json.loads(self("get", kind, f"--selector={selector}", "--output=json"))["items"]
        return found

    def patch(self, kind: str, name: str, change: Mapping[str, Any]) -> None:
        """Change an object: a merge patch, as a person's `kubectl edit` would come out."""
        self("patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}")

    def until(self, kind: str, name: str, done: Callable[[Object], bool], what: str, *, limit: float = LIMIT) -> Object:
        """Follow one object until it is as it should be.

        Args:
            kind: One of `PATHS`.
            name: Of the object, which need not exist yet.
            done: Told the object whenever it changes.
            what: What is waited for, for the message.
            limit: Seconds.

        Returns:
            The object as it then is.

        Raises:
            TooLate: The time is over; the message has what it last was.
        """
        found = self.until_all(
            kind,
            lambda objects: name in objects and done(objects[name]),
            f"{kind}/{name}: {what}",
            field=f"metadata.name={name}",
            limit=limit,
        )
        return found[name]

    def until_all(
        self,
        kind: str,
        done: Callable[[Objects], bool],
        what: str,
        *,
        selector: str = "",
        field: str = "",
        limit: float = LIMIT,
    ) -> dict[str, Object]:
        """Follow all objects of a kind until they are as they should be.

        Args:
            kind: One of `PATHS`.
            done: Told them by name, first as they are, then whenever one changes.
            what: What is waited for, for the message.
            selector: Of labels.
            field: Of fields.
            limit: Seconds.

        Returns:
            Them as they then are.

        Raises:
            TooLate: The time is over; the message has what they last were.
        """
        deadline = time.monotonic() + limit
        objects: dict[str, Object] = {}
        while time.monotonic() < deadline:
            for objects in self._follow(kind, selector, field, deadline):
                if done(objects):
                    return objects
        raise TooLate(f"{what}: not in {limit:.0f} s\n" + "\n".join(map(summary, objects.values())))

    def _follow(self, kind: str, selector: str, field: str, deadline: float) -> Iterator[dict[str, Object]]:
        """The objects after each change, until the server ends the watch."""
        query = {key: value for key, value in (("labelSelector", selector), ("fieldSelector", field)) if value}
        listed = json.loads(self._open(kind, query, 30.0).data)
        objects = {each["metadata"]["name"]: each for each in listed["items"]}
        yield objects
        seconds = max(1.0, deadline - time.monotonic())
        watch = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
        answer = self._open(kind, {**query, **watch, "timeoutSeconds": str(int(seconds) + 1)}, seconds + 5)
        try:
            rest = b""
            for chunk in answer.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":  # the version is too old: the caller lists anew
                        return
                    item = event["object"]
                    if event["type"] == "DELETED":
                        objects.pop(item["metadata"]["name"], None)
                    else:
                        objects[item["metadata"]["name"]] = item
                    yield objects
        finally:
            answer.close()

    def _open(self, kind: str, query: Mapping[str, str], limit: float) -> urllib3.HTTPResponse:
        root, plural, namespaced = PATHS[kind]
        place = f"/namespaces/{self.namespace}" if namespaced else ""
        if self._api is None:
            configuration = Configuration()
            load_kube_config(str(self.cluster.kubeconfig), client_configuration=configuration, persist_config=False)
            self._api = ApiClient(configuration)
        request = self._api.param_serialize(
            "GET", f"{root}{place}/{plural}", query_params=list(query.items()), auth_settings=["BearerToken"]
        )
        answer: urllib3.HTTPResponse = self._api.call_api(*request, _request_timeout=(10.0, limit)).response
        if answer.status != 200:
            raise ClusterError(f"{root}{place}/{plural}: {answer.data.decode(errors='replace')}")
        return answer


def condition(item: Object, type: str) -> Object:
    """A condition of an object; empty where it has none of that type, or one of an older spec."""
    generation = item["metadata"].get("generation", 0)
    for each in item.get("status", {}).get("conditions") or ():
        if each["type"] == type and each.get("observedGeneration", generation) == generation:
            found: Object = each
            return found
    return {}


def has(type: str, status: str, reason: str = "") -> Callable[[Object], bool]:
    """Whether an object has a condition with this status (and reason), judged for its present spec."""

    def done(item: Object) -> bool:
        found = condition(item, type)
        return found.get("status") == status and reason in {"", found.get("reason")}

    return done


def summary(item: Object) -> str:
    """An object's conditions, and an app's last failure, in a few lines."""
    lines = [f"{item.get('kind', '')} {item['metadata']['name']}"]
    lines += [
        f"  {each['type']}={each['status']} {each.get('reason', '')}: {each.get('message', '')}"
        for each in item.get("status", {}).get("conditions") or ()
    ]
    if failure := item.get("status", {}).get("lastFailure"):
        lines.append(f"  lastFailure {json.dumps(failure)}")
    return "\n".join(lines)
