"""The operator image: small, and all that the operator imports is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster.builder import Builder
from e2e.cluster.images import Folder, images
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.local import LocalCluster
from e2e.cluster.provider import Cluster
from e2e.probe import Kubectl, pod_spec

LIMIT = "--timeout=180s"
#: Bytes without compression; most of it is Python itself and the Kubernetes client.
LARGEST = 400e6
FACTS = """
import importlib, json, os, pkgutil, sys
import drumline_operator

for module in pkgutil.walk_packages(drumline_operator.__path__, "drumline_operator."):
    if module.name.rpartition(".")[2] != "__main__":
        importlib.import_module(module.name)
import kopf

print(json.dumps({
    "modules": sorted(sys.modules),
    "installed": sorted({d.metadata["Name"].lower() for d in importlib.import_module("importlib.metadata").distributions()}),
    "user": [os.getuid(), os.getgid()],
    "compiled": os.path.exists(drumline_operator.__cached__),
    "version": importlib.metadata.version("drumline"),
}))
"""


def run(kubectl: Kubectl, namespace: str, image: str, phase: str, **container: Any) -> dict[str, Any]:
    """Run a pod of the restricted profile to its end; the pod."""
    spec = pod_spec(image, 0)
    del spec["containers"][0]["readinessProbe"]
    spec["containers"][0] |= container
    # Debian's Python keeps a few caches; the operator's own pods have a writable /tmp as well.
    spec["containers"][0]["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    spec["containers"][0]["resources"] = {"requests": {"cpu": "10m"}, "limits": {"memory": "256Mi"}}
    spec |= {"restartPolicy": "Never", "volumes": [{"name": "tmp", "emptyDir": {}}]}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "once", "namespace": namespace}, "spec": spec}
    kubectl("create", "--filename=-", input=json.dumps(item))
    kubectl("wait", f"--for=jsonpath={{.status.phase}}={phase}", "pod/once", f"--namespace={namespace}", LIMIT)
    pod: dict[str, Any] = json.loads(kubectl("get", "pod", "once", f"--namespace={namespace}", "--output=json"))
    return pod


def test_it_has_what_it_imports_and_no_torch(kubectl: Kubectl, namespace: str, operator_image: str) -> None:
    run(kubectl, namespace, operator_image, "Succeeded", command=["python", "-P", "-c", FACTS])
    facts = json.loads(kubectl("logs", "once", f"--namespace={namespace}"))
    own = {path.stem for path in (CHECKOUT / "operator/drumline_operator").glob("*.py")} - {"__init__", "__main__"}
    assert {f"drumline_operator.{name}" for name in own} <= set(facts["modules"])
    assert not {"torch", "numpy", "fastapi", "pip", "uv"} & set(facts["installed"])
    assert facts["user"][0] == 10001
    assert facts["compiled"]
    assert f'version = "{facts["version"]}"' in (CHECKOUT / "pyproject.toml").read_text()


def test_its_entry_point_is_the_operator(kubectl: Kubectl, namespace: str, operator_image: str) -> None:
    wrong = {"name": "DRUMLINE_OPERATOR_LOG_LEVEL", "value": "loud"}
    options = {"env": [wrong], "terminationMessagePolicy": "FallbackToLogsOnError"}
    pod = run(kubectl, namespace, operator_image, "Failed", **options)
    (status,) = pod["status"]["containerStatuses"]
    ended = status["state"]["terminated"]
    assert ended["exitCode"] == 2
    assert "DRUMLINE_OPERATOR_LOG_LEVEL" in ended["message"]


def test_it_is_small(cluster: Cluster, operator_image: str) -> None:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("the image is not a folder here")
    layout: Path = Builder(report=lambda _: None).layout(operator_image)
    (image,) = images(Folder(layout))
    assert image.name == operator_image
    assert sum(image.blobs.values()) < LARGEST
