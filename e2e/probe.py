"""Pods that answer questions about themselves (tools/images/probe), and the questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from e2e.cluster.errors import ClusterError
from e2e.cluster.waiting import wait_for

Kubectl = Callable[..., str]
GPU = "nvidia.com/gpu"


def pod_spec(image: str, gpus: int) -> dict[str, Any]:
    """A pod of the restricted profile that answers on port 8080."""
    container = {
        "name": "probe",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 30},
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi", GPU: gpus}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "containers": [container],
        "terminationGracePeriodSeconds": 1,
        # However long a test takes to bring a node back.
        "tolerations": [
            {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute"}
            for key in ("not-ready", "unreachable")
        ],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
    }


def application(namespace: str, image: str, *, replicas: int, gpus: int) -> str:
    """A Deployment with one pod per node and a Service before it, both named `probe`."""
    labels = {"app": "probe"}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": labels},
    }
    template = {"metadata": {"labels": labels}, "spec": pod_spec(image, gpus) | {"topologySpreadConstraints": [spread]}}
    items = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "probe", "namespace": namespace},
            "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "probe", "namespace": namespace},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


#: Seconds in which a question that nothing stands against is answered: kube-proxy and DNS follow Services and pods with a
#: delay of which nobody is told, a second or less, but on a busy machine.
LIMIT = 90.0


def ask_until(
    kubectl: Kubectl, pod: dict[str, Any], question: str, right: Callable[[list[str]], bool] = bool
) -> list[str]:
    """Put a question to a pod again and again, until the answer is right.

    For what follows a Service or its pods without notice: names, and rules that lead to it.

    Args:
        kubectl: Of the cluster.
        pod: Which is Ready.
        question: See `ask`.
        right: Of the answer; any that is not empty will do unless it says otherwise.

    Returns:
        That answer.

    Raises:
        ClusterError: None came; the message has the last answer, or why there was none.
    """
    answer: list[str] = []
    last = ""

    def answered() -> bool:
        nonlocal answer, last
        try:
            answer = ask(kubectl, pod, question)
        except ClusterError as error:
            last = str(error)
            return False
        last = f"the last answer: {answer}"
        return right(answer)

    wait_for(f"an answer to {question}", answered, limit=LIMIT, explain=lambda: last)
    return answer


def ask(kubectl: Kubectl, pod: dict[str, Any], question: str) -> list[str]:
    """Put a question to a pod, through the API server, so that it works in any cluster."""
    place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}:8080/proxy"
    return kubectl("get", f"--raw={place}{question}").split()
