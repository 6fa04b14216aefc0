"""The apps that scenarios run: code in ConfigMaps, on CPU ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from e2e.harness.kube import LIMIT, Kube, Object, Objects, condition, has

CODE: Final = Path(__file__).parent / "worker_code.py"
#: What the restricted profile asks of a container and of a pod.
RESTRICTED_CONTAINER: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
RESTRICTED_POD: Final = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_ENV: Final = {"OMP_NUM_THREADS": "1"}


def config_map(name: str, files: Mapping[str, str]) -> Object:
    """A ConfigMap."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(files)}


def code(name: str = "code") -> Object:
    """The ConfigMap with the scenarios' workers."""
    return config_map(name, {"worker_code.py": CODE.read_text(encoding="utf-8")})


def app(name: str, worker: str = "Steps", *, env: Mapping[str, str] | None = None, **spec: Any) -> Object:
    """A DistributedApp with two CPU ranks that asks for little.

    Args:
        name: Of the app.
        worker: One of the classes of `worker_code.py`.
        env: Environment variables.
        spec: Fields that replace ours; None leaves one out.
    """
    fields = {
        "workerClass": f"worker_code:{worker}",
        "source": {"configMap": {"name": "code"}},
        "numGPUs": 0,
        "worldSize": 2,
        "resources": {"requests": {"cpu": "20m", "memory": "128Mi"}},
        "env": [{"name": key, "value": value} for key, value in {**_ENV, **(env or {})}.items()],
        **spec,
    }
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": name},
        "spec": {key: value for key, value in fields.items() if value is not None},
    }


def live(pods: Objects) -> list[Object]:
    """Those that are not on their way out."""
    return [
        pod
        for pod in pods.values()
        if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") not in {"Succeeded", "Failed"}
    ]


class App:
    """An app in a namespace, and what scenarios do with it."""

    def __init__(self, kube: Kube, manifest: Object) -> None:
        self.kube, self.name = kube, str(manifest["metadata"]["name"])
        self.labels = f"drumline.dev/app={self.name}"
        self.url = f"http://{self.name}.{kube.namespace}.svc:8080"
        kube.apply(manifest)

    def change(self, **spec: Any) -> None:
        """Change fields of the spec."""
        self.kube.patch("dapp", self.name, {"spec": spec})

    def set_env(self, **values: str) -> None:
        """Give it these environment variables beside ours."""
        self.change(env=[{"name": key, "value": value} for key, value in {**_ENV, **values}.items()])

    def ready(self, limit: float = LIMIT) -> Object:
        """Wait until all its replicas serve its present spec; the app.

        A status of before a pod was lost, say, does not count: it must be about the pods that there are, all of them ready.
        """
        deadline = time.monotonic() + limit
        seen = ""

        def done(item: Object) -> bool:
            status, wanted = item.get("status", {}), item["spec"].get("replicas", 1)
            whole = status.get("replicas") == status.get("readyReplicas") == wanted
            return has("Ready", "True")(item) and whole and item["metadata"]["resourceVersion"] != seen

        while True:
            item = self.kube.until("dapp", self.name, done, "is ready", limit=deadline - time.monotonic())
            wanted = item["spec"].get("replicas", 1)
            pods = self.kube.until_all(
                "pod",
                lambda pods: list(map(has("Ready", "True"), live(pods))) == [True] * wanted,  # noqa: B023
                f"{wanted} pods of {self.name} are ready",
                selector=self.labels,
                limit=deadline - time.monotonic(),
            )
            serving = {group["podName"] for group in item["status"].get("groups", ()) if group["state"] == "Serving"}
            if serving == {pod["metadata"]["name"] for pod in live(pods)}:
                return item
            seen = item["metadata"]["resourceVersion"]  # older than its pods: there will be another one

    def replaced(self, limit: float = LIMIT) -> Object:
        """Wait until all its replicas serve its present spec and nothing older is left that could still answer."""

        def done(item: Object) -> bool:
            return bool(len(item["status"].get("groups", ())) == item["spec"].get("replicas", 1))

        self.ready(limit)
        return self.kube.until("dapp", self.name, done, "has no pods of an older revision", limit=limit)

    def shows(self, type: str, status: str, reason: str, words: str = "", limit: float = LIMIT) -> Object:
        """Wait for a condition whose message has these words; the app as it then is, with its other conditions."""

        def done(item: Object) -> bool:
            return has(type, status, reason)(item) and words in condition(item, type)["message"]

        what = f"{type}={status} {reason}" + (f" with {words!r}" if words else "")
        return self.kube.until("dapp", self.name, done, what, limit=limit)

    def says(self, type: str, status: str, reason: str, words: str = "", limit: float = LIMIT) -> str:
        """Wait for a condition whose message has these words; the message."""
        return str(condition(self.shows(type, status, reason, words, limit), type)["message"])

    def pods(self) -> list[Object]:
        """Its pods that are not on their way out, oldest first."""
        found = [each for each in self.kube.list("pod", self.labels) if "deletionTimestamp" not in each["metadata"]]
        return sorted(found, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def pod(self) -> Object:
        """Its only pod."""
        (found,) = self.pods()
        return found

    def execute(self, pod: str, *command: str) -> str:
        """Run a command in the worker container of a pod."""
        return self.kube("exec", pod, "--container=worker", "--", *command)

    def release(self, *pods: str) -> None:
        """Let streams that were told to wait for it come to their end."""
        for name in pods:
            self.execute(name, "touch", "/tmp/release")

    def reported(self, *words: str) -> None:
        """Wait until `kubectl describe` shows these words under Events, each in one of them: events come when they come."""

        def done(events: Objects) -> bool:
            lines = [f"{each['type']} {each['reason']}: {each['message']}" for each in events.values()]
            return all(any(each in line for line in lines) for each in words)

        self.kube.until_all("event", done, f"events with {words}", field=f"involvedObject.name={self.name}")
