"""The apps that scenarios run: code in ConfigMaps, on CPU ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from e2e.harness.kube import LIMIT, Kube, Object, condition, has

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
        """Wait until all its replicas serve its present spec; the app."""

        def done(item: Object) -> bool:
            status, wanted = item.get("status", {}), item["spec"].get("replicas", 1)
            return has("Ready", "True")(item) and status.get("replicas") == status.get("readyReplicas") == wanted

        return self.kube.until("dapp", self.name, done, "is ready", limit=limit)

    def replaced(self, limit: float = LIMIT) -> Object:
        """Wait until all its replicas serve its present spec and nothing older is left that could still answer."""

        def done(item: Object) -> bool:
            return bool(len(item["status"].get("groups", ())) == item["spec"].get("replicas", 1))

        self.ready(limit)
        return self.kube.until("dapp", self.name, done, "has no pods of an older revision", limit=limit)

    def says(self, type: str, status: str, reason: str, limit: float = LIMIT) -> str:
        """Wait for a condition; its message."""
        found = self.kube.until("dapp", self.name, has(type, status, reason), f"{type}={status} {reason}", limit=limit)
        return str(condition(found, type)["message"])

    def pods(self) -> list[Object]:
        """Its pods that are not on their way out, oldest first."""
        found = [each for each in self.kube.list("pod", self.labels) if not each["metadata"].get("deletionTimestamp")]
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

    def events(self) -> list[str]:
        """What `kubectl describe` shows under Events."""
        found = self.kube("get", "events", f"--field-selector=involvedObject.name={self.name}", "--output=json")
        return [f"{each['type']} {each['reason']}: {each['message']}" for each in json.loads(found)["items"]]
