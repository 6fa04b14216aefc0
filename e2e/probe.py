"""Pods that answer questions about themselves (tools/images/probe), and the questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Kubectl = Callable[..., str]
GPU = "nvidia.com/gpu"


def pod_spec(image: str, gpus: int) -> dict[str, Any]:
    """A pod of the restricted profile that answers on port 8080."""
    container = {
        "name": "probe",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
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


def ask(kubectl: Kubectl, pod: dict[str, Any], question: str) -> list[str]:
    """Put a question to a pod, through the API server, so that it works in any cluster."""
    place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}:8080/proxy"
    return kubectl("get", f"--raw={place}{question}").split()
