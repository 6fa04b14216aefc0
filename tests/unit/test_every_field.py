"""A field exists only when it works: each one of both kinds changes what is documented of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from drumline.api.v1alpha1 import API_VERSION, DistributedAppSpec, MachineTypeSpec
from drumline_operator import machine_types
from drumline_operator.machine_types import Machine, NoMachine
from drumline_operator.manifests import deployment, networkpolicy, pdb, service
from drumline_operator.manifests.context import Context
from drumline_operator.manifests.labels import REVISION
from drumline_operator.manifests.names import INPUTS, TEMPLATE
from drumline_operator.observe import NodeView
from drumline_operator.plan import validated
from drumline_operator.settings import OperatorSettings

Spec = dict[str, Any]
SETTINGS = OperatorSettings(worker_image="base:1")
NODE = NodeView("n1", {"pool": "gpu"}, {"nvidia.com/gpu": "8", "amd.com/gpu": "8"})


def fields(model: type[BaseModel], place: str = "") -> Iterator[str]:
    """The places of all fields that are no models themselves, by their names in YAML; those of a list's items have []."""
    for name, field in model.model_fields.items():
        here = f"{place}{field.alias or name}"
        inner = of(field.annotation)
        if inner is None:
            yield here
        else:
            kind, listed = inner
            yield from fields(kind, f"{here}{'[]' if listed else ''}.")


def of(annotation: Any) -> tuple[type[BaseModel], bool] | None:
    """The model within an annotation, and whether it is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return of(arguments[0])
    if origin in (Union, UnionType):
        return next((found for each in arguments if each is not NoneType and (found := of(each))), None)
    if origin is list and (found := of(arguments[0])):
        return found[0], True
    return None


def made(spec: Spec, machine: Spec) -> dict[str, Any]:
    """Everything that the operator makes of an app, by place: ``Service spec.ports[http].port``."""
    metadata = {"name": "sdxl", "namespace": "ml", "uid": "u1"}
    full = {"workerClass": "app:W", "image": "a:1", "numGPUs": 2, **spec}
    raw = {"apiVersion": API_VERSION, "kind": "DistributedApp", "metadata": metadata, "spec": full}
    app = validated({key: value for key, value in raw.items() if value is not None}, SETTINGS)
    types = [{"metadata": {"name": "h100"}, "spec": {"nodeSelector": {"pool": "gpu"}, **machine}}]
    found = machine_types.resolve(app.spec, types, [NODE])
    place = found.spec if isinstance(found, Machine) else None
    context = Context(app, "u1", SETTINGS, place, "")
    built = [each.build(context) for each in (deployment, service, pdb, networkpolicy)]
    result: dict[str, Any] = {"status.url": service.url(context), "status.updateRevision": context.revision}
    if isinstance(found, NoMachine):
        result["no machine"] = found.message
    elif found is not None and found.warning:
        result["machine's warning"] = found.warning
    for each in built:
        if each is not None:
            result |= {shortened(f"{each['kind']} {where}"): value for where, value in flat(each)}
    return result


def shortened(place: str) -> str:
    template = "Deployment spec.template."
    short = place.replace(f"{template}spec.containers[worker].", "worker ")
    return short.replace(f"{template}spec.", "pod ").replace(template, "pod ")


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values within ``value`` by place; what only follows from others is left out, what is in a pod begins with it."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            if key not in {INPUTS, TEMPLATE}:
                yield from flat(each, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            key = next((key for key in ("mountPath", "name") if key in each), "")
            rest = {name: value for name, value in each.items() if name != key}
            yield from flat(rest or each[key], f"{place}[{each.get(key, number)}]")
    else:
        yield place, value


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is another one after, with what it then is; None: it is gone. A child that is new is only named."""
    places = {each for each in before.keys() | after.keys() if before.get(each) != after.get(each)}
    known = {each.partition(" ")[0] for each in before}
    new = {each for each in places if each.partition(" ")[0] not in known and " spec." in each}
    kinds = {each.partition(" ")[0] for each in new}
    result = {each: after.get(each) for each in places if each.partition(" ")[0] not in kinds}
    return result | dict.fromkeys(kinds, "made")


#: By field: an app before and after, whether its pods are replaced, and all that is another one then.
APP: dict[str, tuple[Spec, Spec, bool, Spec]] = {
    "workerClass": ({}, {"workerClass": "app:V"}, True, {"worker env[DRUMLINE_TARGET].value": "app:V"}),
    "setupArgs": ({}, {"setupArgs": {"a": 1}}, True, {"worker env[DRUMLINE_SETUP_ARGS].value": '{"a":1}'}),
    "warmupPayload": ({}, {"warmupPayload": {"a": 1}}, True, {"worker env[DRUMLINE_WARMUP_PAYLOAD].value": '{"a":1}'}),
    "image": ({}, {"image": "a:2"}, True, {"worker image": "a:2"}),
    "imagePullPolicy": ({}, {"imagePullPolicy": "Always"}, True, {"worker imagePullPolicy": "Always"}),
    "imagePullSecrets[].name": ({}, {"imagePullSecrets": [{"name": "s"}]}, True, {"pod imagePullSecrets[s]": "s"}),
    "source.configMap.name": (
        {"source": {"configMap": {"name": "a"}}},
        {"source": {"configMap": {"name": "b"}}},
        True,
        {"pod volumes[source].configMap.name": "b"},
    ),
    "source.git.url": (
        {"source": {"git": {"url": "https://x.y/a", "revision": "main"}}},
        {"source": {"git": {"url": "https://x.y/b", "revision": "main"}}},
        True,
        {"pod initContainers[source].env[URL].value": "https://x.y/b"},
    ),
    "source.git.revision": (
        {"source": {"git": {"url": "https://x.y/a", "revision": "main"}}},
        {"source": {"git": {"url": "https://x.y/a", "revision": "v1"}}},
        True,
        {"pod initContainers[source].env[REVISION].value": "v1"},
    ),
    "source.git.path": (
        {"source": {"git": {"url": "https://x.y/a", "revision": "main"}}},
        {"source": {"git": {"url": "https://x.y/a", "revision": "main", "path": "a/b"}}},
        True,
        {"worker workingDir": "/source/a/b"},
    ),
    "source.git.secretRef.name": (
        {"source": {"git": {"url": "https://x.y/a", "revision": "main"}}},
        {"source": {"git": {"url": "https://x.y/a", "revision": "main", "secretRef": {"name": "s"}}}},
        True,
        {
            "pod initContainers[source].volumeMounts[/credentials].name": "credentials",
            "pod initContainers[source].volumeMounts[/credentials].readOnly": True,
            "pod volumes[credentials].secret.secretName": "s",
        },
    ),
    "source.persistentVolumeClaim.claimName": (
        {"source": {"persistentVolumeClaim": {"claimName": "c"}}},
        {"source": {"persistentVolumeClaim": {"claimName": "d"}}},
        True,
        {"pod volumes[source].persistentVolumeClaim.claimName": "d"},
    ),
    "source.persistentVolumeClaim.subPath": (
        {"source": {"persistentVolumeClaim": {"claimName": "c"}}},
        {"source": {"persistentVolumeClaim": {"claimName": "c", "subPath": "a"}}},
        True,
        {"worker volumeMounts[/source].subPath": "a"},
    ),
    "numGPUs": (
        {},
        {"numGPUs": 4},
        True,
        {
            "worker env[DRUMLINE_NUM_GPUS].value": "4",
            "worker env[DRUMLINE_WORLD_SIZE].value": "4",
            "worker resources.limits.nvidia.com/gpu": 4,
        },
    ),
    "worldSize": ({"numGPUs": 0}, {"numGPUs": 0, "worldSize": 3}, True, {"worker env[DRUMLINE_WORLD_SIZE].value": "3"}),
    "machineType": ({}, {"machineType": "h100"}, True, {"pod nodeSelector.pool": "gpu"}),
    "gpu.allocation": (
        {"gpu": {"resourceClaimTemplateName": "t"}},
        {"gpu": {"allocation": "ResourceClaim", "resourceClaimTemplateName": "t"}},
        True,
        {
            "pod resourceClaims[gpus].resourceClaimTemplateName": "t",
            "worker resources.claims[gpus]": "gpus",
            "worker resources.limits.nvidia.com/gpu": None,
        },
    ),
    "gpu.resourceName": (
        {},
        {"gpu": {"resourceName": "amd.com/gpu"}},
        True,
        {"worker resources.limits.amd.com/gpu": 2, "worker resources.limits.nvidia.com/gpu": None},
    ),
    "gpu.resourceClaimTemplateName": (
        {"gpu": {"allocation": "ResourceClaim", "resourceClaimTemplateName": "t"}},
        {"gpu": {"allocation": "ResourceClaim", "resourceClaimTemplateName": "u"}},
        True,
        {"pod resourceClaims[gpus].resourceClaimTemplateName": "u"},
    ),
    "communication.backend": (
        {},
        {"communication": {"backend": "Gloo"}},
        True,
        {"worker env[DRUMLINE_BACKEND].value": "gloo"},
    ),
    "communication.timeoutSeconds": (
        {},
        {"communication": {"timeoutSeconds": 9}},
        True,
        {"worker env[DRUMLINE_COLLECTIVE_TIMEOUT].value": "9.0"},
    ),
    "replicas": ({}, {"replicas": 3}, False, {"Deployment spec.replicas": 3}),
    "resources.requests": ({}, {"resources": {"requests": {"cpu": "1"}}}, True, {"worker resources.requests.cpu": "1"}),
    "resources.limits": (
        {},
        {"resources": {"limits": {"memory": "1Gi"}}},
        True,
        {"worker resources.limits.memory": "1Gi"},
    ),
    "sharedMemorySize": ({}, {"sharedMemorySize": "2Gi"}, True, {"pod volumes[shm].emptyDir.sizeLimit": "2Gi"}),
    "env[].name": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "B", "value": "1"}]},
        True,
        {"worker env[A].value": None, "worker env[B].value": "1"},
    ),
    "env[].value": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "A", "value": "2"}]},
        True,
        {"worker env[A].value": "2"},
    ),
    "env[].valueFrom": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
        True,
        {
            "worker env[A].value": None,
            "worker env[A].valueFrom.secretKeyRef.key": "k",
            "worker env[A].valueFrom.secretKeyRef.name": "s",
        },
    ),
    "envFrom": ({}, {"envFrom": [{"secretRef": {"name": "s"}}]}, True, {"worker envFrom[0].secretRef.name": "s"}),
    "modelCache.claimName": (
        {},
        {"modelCache": {"claimName": "c"}},
        True,
        {"pod volumes[cache].emptyDir": None, "pod volumes[cache].persistentVolumeClaim.claimName": "c"},
    ),
    "modelCache.mountPath": (
        {},
        {"modelCache": {"mountPath": "/models"}},
        True,
        {
            "worker env[TORCHINDUCTOR_CACHE_DIR].value": "/models/.cache/torchinductor",
            "worker env[TRITON_CACHE_DIR].value": "/models/.cache/triton",
            "worker env[XDG_CACHE_HOME].value": "/models/.cache",
            "worker volumeMounts[/data].name": None,
            "worker volumeMounts[/models].name": "cache",
        },
    ),
    "modelCache.compileCachePath": (
        {},
        {"modelCache": {"compileCachePath": "/compiled"}},
        True,
        {
            "pod volumes[compiled].emptyDir": {},
            "worker env[TORCHINDUCTOR_CACHE_DIR].value": "/compiled",
            "worker volumeMounts[/compiled].name": "compiled",
        },
    ),
    "serving.port": (
        {},
        {"serving": {"port": 9000}},
        True,
        {
            "Service spec.ports[http].port": 9000,
            "status.url": "http://sdxl.ml.svc.cluster.local:9000",
            "worker env[DRUMLINE_PORT].value": "9000",
            "worker ports[http].containerPort": 9000,
        },
    ),
    "serving.requestTimeoutSeconds": (
        {},
        {"serving": {"requestTimeoutSeconds": 9}},
        True,
        {"worker env[DRUMLINE_REQUEST_TIMEOUT].value": "9.0"},
    ),
    "serving.startupTimeoutSeconds": (
        {},
        {"serving": {"startupTimeoutSeconds": 100}},
        True,
        {"worker env[DRUMLINE_STARTUP_TIMEOUT].value": "100.0", "worker startupProbe.failureThreshold": 80},
    ),
    "serving.maxQueueDepth": (
        {},
        {"serving": {"maxQueueDepth": 9}},
        True,
        {"worker env[DRUMLINE_MAX_QUEUE_DEPTH].value": "9"},
    ),
    "serving.streamKeepaliveSeconds": (
        {},
        {"serving": {"streamKeepaliveSeconds": 9}},
        True,
        {"worker env[DRUMLINE_STREAM_KEEPALIVE].value": "9.0"},
    ),
    "serving.auth.type": (
        {"serving": {"auth": {"secretRef": {"name": "s"}}}},
        {"serving": {"auth": {"type": "APIKey", "secretRef": {"name": "s"}}}},
        True,
        {
            "worker env[DRUMLINE_API_KEYS].valueFrom.secretKeyRef.key": "api-keys",
            "worker env[DRUMLINE_API_KEYS].valueFrom.secretKeyRef.name": "s",
        },
    ),
    "serving.auth.secretRef.name": (
        {"serving": {"auth": {"type": "APIKey", "secretRef": {"name": "s"}}}},
        {"serving": {"auth": {"type": "APIKey", "secretRef": {"name": "t"}}}},
        True,
        {"worker env[DRUMLINE_API_KEYS].valueFrom.secretKeyRef.name": "t"},
    ),
    "rollout.type": (
        {},
        {"rollout": {"type": "Recreate"}},
        False,
        {
            "Deployment spec.strategy.rollingUpdate.maxSurge": None,
            "Deployment spec.strategy.rollingUpdate.maxUnavailable": None,
            "Deployment spec.strategy.type": "Recreate",
        },
    ),
    "rollout.maxSurge": (
        {},
        {"rollout": {"maxSurge": 1}},
        False,
        {
            "Deployment spec.strategy.rollingUpdate.maxSurge": 1,
            "Deployment spec.strategy.rollingUpdate.maxUnavailable": 0,
        },
    ),
    "rollout.maxUnavailable": (
        {},
        {"rollout": {"maxUnavailable": "50%"}},
        False,
        {"Deployment spec.strategy.rollingUpdate.maxUnavailable": "50%"},
    ),
    "rollout.progressDeadlineSeconds": (
        {},
        {"rollout": {"progressDeadlineSeconds": 9}},
        False,
        {"Deployment spec.progressDeadlineSeconds": 9},
    ),
    "rollout.drainTimeoutSeconds": (
        {},
        {"rollout": {"drainTimeoutSeconds": 9}},
        True,
        {"pod terminationGracePeriodSeconds": 42, "worker env[DRUMLINE_DRAIN_TIMEOUT].value": "9.0"},
    ),
    "failurePolicy.type": (
        {},
        {"failurePolicy": {"type": "RecreatePod"}},
        True,
        {"worker env[DRUMLINE_RESTART].value": '{"max_restarts":0}'},
    ),
    "failurePolicy.maxGroupRestarts": (
        {},
        {"failurePolicy": {"maxGroupRestarts": 3}},
        True,
        {"worker env[DRUMLINE_RESTART].value": '{"max_restarts":3}'},
    ),
    "failurePolicy.windowSeconds": (
        {},
        {"failurePolicy": {"windowSeconds": 9}},
        True,
        {"worker env[DRUMLINE_RESTART].value": '{"window_seconds":9.0}'},
    ),
    "failurePolicy.hangTimeoutSeconds": (
        {},
        {"failurePolicy": {"hangTimeoutSeconds": 9}},
        True,
        {"worker env[DRUMLINE_HANG_TIMEOUT].value": "9.0"},
    ),
    "suspend": ({}, {"suspend": True}, False, {"Deployment spec.replicas": 0}),
    "networkPolicy": ({}, {"networkPolicy": "DenyAllIngress"}, False, {"NetworkPolicy": "made"}),
    "podTemplate.metadata.labels": (
        {},
        {"podTemplate": {"metadata": {"labels": {"a": "b"}}}},
        True,
        {"pod metadata.labels.a": "b"},
    ),
    "podTemplate.metadata.annotations": (
        {},
        {"podTemplate": {"metadata": {"annotations": {"a": "b"}}}},
        True,
        {"pod metadata.annotations.a": "b"},
    ),
    "podTemplate.spec": (
        {},
        {"podTemplate": {"spec": {"priorityClassName": "high"}}},
        True,
        {"pod priorityClassName": "high"},
    ),
}
#: The same of MachineTypes, for an app with two GPUs.
MACHINE: dict[str, tuple[Spec, Spec, bool, Spec]] = {
    "resourceName": (
        {},
        {"resourceName": "amd.com/gpu"},
        True,
        {"worker resources.limits.amd.com/gpu": 2, "worker resources.limits.nvidia.com/gpu": None},
    ),
    "gpusPerNode": (
        {},
        {"gpusPerNode": 1},
        True,
        {
            "no machine": "spec.numGPUs 2 is more than one h100 has (1); a replica runs on one node: "
            "ask for fewer GPUs or for another machineType",
            "pod nodeSelector.pool": None,
        },
    ),
    "nodeSelector": (
        {},
        {"nodeSelector": {"pool": "gpu", "more": "x"}},
        True,
        {"machine's warning": "h100 has 0 nodes (label more=x,pool=gpu)", "pod nodeSelector.more": "x"},
    ),
    "tolerations": (
        {},
        {"tolerations": [{"key": "gpu", "operator": "Exists"}]},
        True,
        {"pod tolerations[0].key": "gpu", "pod tolerations[0].operator": "Exists"},
    ),
    "runtimeClassName": ({}, {"runtimeClassName": "nvidia"}, True, {"pod runtimeClassName": "nvidia"}),
    "sharedMemorySizePerGPU": (
        {},
        {"sharedMemorySizePerGPU": "3Gi"},
        True,
        {"pod volumes[shm].emptyDir.sizeLimit": "6Gi"},
    ),
    "env[].name": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "B", "value": "1"}]},
        True,
        {"worker env[A].value": None, "worker env[B].value": "1"},
    ),
    "env[].value": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "A", "value": "2"}]},
        True,
        {"worker env[A].value": "2"},
    ),
    "env[].valueFrom": (
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
        True,
        {
            "worker env[A].value": None,
            "worker env[A].valueFrom.secretKeyRef.key": "k",
            "worker env[A].valueFrom.secretKeyRef.name": "s",
        },
    ),
    "aliases": ({}, {"aliases": ["GPU-H200"]}, True, {"no machine": None, "pod nodeSelector.pool": "gpu"}),
}


def test_each_field_has_its_entry() -> None:
    """A new field comes with what it changes."""
    assert set(fields(DistributedAppSpec)) == APP.keys()
    assert set(fields(MachineTypeSpec)) == MACHINE.keys()


def check(before: dict[str, Any], after: dict[str, Any], restarts: bool, expected: Spec) -> None:
    found = changed(before, after)
    follows = {each for each in found if each.endswith((REVISION, "[DRUMLINE_REVISION].value", "updateRevision"))}
    assert {each: value for each, value in found.items() if each not in follows} == expected
    assert expected
    # Pods are replaced because their label is another one; whoever waits for it finds it in the status, and in the ranks.
    assert len(follows) == (3 if restarts else 0)


@pytest.mark.parametrize("field", APP)
def test_a_field_of_an_app_does_what_is_documented(field: str) -> None:
    before, after, restarts, expected = APP[field]
    check(made(before, {}), made(after, {}), restarts, expected)


@pytest.mark.parametrize("field", MACHINE)
def test_a_field_of_a_machine_type_does_what_is_documented(field: str) -> None:
    before, after, restarts, expected = MACHINE[field]
    app = {"machineType": "GPU-H200" if field == "aliases" else "h100"}
    check(made(app, before), made(app, after), restarts, expected)
