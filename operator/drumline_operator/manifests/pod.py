"""The pod of a replica: one worker container with the runner and its ranks. PURE."""

from __future__ import annotations

import math
from typing import Any, Final

from drumline.api.manifests import to_settings
from drumline.api.v1alpha1 import GitSource
from drumline.contract import RunnerSettings
from drumline_operator import quantity
from drumline_operator.manifests import labels
from drumline_operator.manifests.context import Context
from drumline_operator.manifests.merge import by_key, merge

WORKER_CONTAINER: Final = "worker"
SOURCE_CONTAINER: Final = "source"
SOURCE_PATH: Final = "/source"
_CREDENTIALS: Final = "/credentials"
_USER: Final = 10001
#: Seconds between the end of the drain and the kill: teardown() on the ranks.
_TEARDOWN: Final = 30
_STARTUP_PERIOD: Final = 2
#: The runner's own time-out comes first, so that its reason is the one that is seen.
_STARTUP_MARGIN: Final = 60
#: Entry of the Secret that spec.serving.auth names.
API_KEYS_ENTRY: Final = "api-keys"

_FETCH: Final = f"""set -eu
if [ -f {_CREDENTIALS}/ssh-privatekey ]; then
  export GIT_SSH_COMMAND="ssh -i {_CREDENTIALS}/ssh-privatekey -o IdentitiesOnly=yes \
-o UserKnownHostsFile={_CREDENTIALS}/known_hosts -o StrictHostKeyChecking=yes"
elif [ -f {_CREDENTIALS}/password ]; then
  git config --global credential.helper \
'!f() {{ echo "username=$(cat {_CREDENTIALS}/username)"; echo "password=$(cat {_CREDENTIALS}/password)"; }}; f'
fi
git config --global --add safe.directory {SOURCE_PATH}
git init -q {SOURCE_PATH}
cd {SOURCE_PATH}
if git fetch -q --depth 1 -- "$URL" "$REVISION"; then
  git checkout -q -f FETCH_HEAD
else
  # A short commit id cannot be asked for by name.
  git fetch -q --tags -- "$URL" '+refs/heads/*:refs/remotes/origin/*'
  git checkout -q -f --detach "$REVISION"
fi
"""


def build(context: Context) -> dict[str, Any]:
    """Return the pod template, with ``spec.podTemplate`` merged over it.

    Raises:
        ConfigurationError: ``spec.env`` holds a ``DRUMLINE_*`` variable that is unknown or wrong.
    """
    spec, machine = context.app.spec, context.machine
    settings = runner_settings(context)
    volumes, mounts = _volumes(context)
    pod: dict[str, Any] = {
        "enableServiceLinks": False,  # they make DRUMLINE_* variables of an app called drumline
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": math.ceil(settings.drain_delay + settings.drain_timeout) + _TEARDOWN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_worker(context, settings, mounts)],
        "volumes": volumes,
    }
    if spec.source is not None and spec.source.git is not None:
        pod["initContainers"] = [_fetch(context, spec.source.git)]
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": each.name} for each in spec.image_pull_secrets]
    if spec.gpu.allocation == "ResourceClaim":
        pod["resourceClaims"] = [{"name": "gpus", "resourceClaimTemplateName": spec.gpu.resource_claim_template_name}]
    if machine is not None:
        if machine.node_selector:
            pod["nodeSelector"] = dict(machine.node_selector)
        if machine.tolerations:
            pod["tolerations"] = [dict(each) for each in machine.tolerations]
        if machine.runtime_class_name:
            pod["runtimeClassName"] = machine.runtime_class_name
    template: dict[str, Any] = {"metadata": {}, "spec": pod}
    if spec.pod_template is not None:
        template = merge(template, spec.pod_template.model_dump(by_alias=True, exclude_defaults=True))
    own = {**labels.common(context.name), labels.REVISION: context.revision}
    # Last, because Services and Deployments find their pods by these.
    template["metadata"]["labels"] = {**template["metadata"].get("labels", {}), **own}
    return template


def runner_settings(context: Context) -> RunnerSettings:
    """Return what the runner in the pod is told."""
    return to_settings(context.app).model_copy(
        update={"host": "0.0.0.0", "log_format": "json", "revision": context.revision}
    )


def _worker(context: Context, settings: RunnerSettings, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    spec = context.app.spec
    container: dict[str, Any] = {
        "name": WORKER_CONTAINER,
        "image": context.image,
        "args": ["drumline", "serve"],  # behind the image's entry point, which reaps and forwards signals
        "env": _environment(context, settings),
        "ports": [{"name": "http", "containerPort": settings.port}],
        "resources": _resources(context),
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": {
            **_probe("/startupz", _STARTUP_PERIOD, 5),
            "failureThreshold": math.ceil((settings.startup_timeout + _STARTUP_MARGIN) / _STARTUP_PERIOD),
        },
        "readinessProbe": {**_probe("/readyz", 5, 5), "failureThreshold": 2},
        "livenessProbe": {**_probe("/healthz", 20, 10), "failureThreshold": 6},
    }
    if spec.image_pull_policy:
        container["imagePullPolicy"] = spec.image_pull_policy
    if spec.env_from:
        container["envFrom"] = [dict(each) for each in spec.env_from]
    if spec.source is not None:
        git = spec.source.git
        container["workingDir"] = f"{SOURCE_PATH}/{git.path.strip('/')}" if git and git.path else SOURCE_PATH
    return container


def _probe(path: str, period: int, timeout: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period, "timeoutSeconds": timeout}


def _environment(context: Context, settings: RunnerSettings) -> list[dict[str, Any]]:
    """Variables of the MachineType, ours, the app's: the later one wins."""
    spec = context.app.spec
    cache = f"{spec.model_cache.mount_path.rstrip('/')}/.cache"
    own = {
        "HOME": "/tmp",  # noqa: S108 - the pod's own
        "XDG_CACHE_HOME": cache,
        "TORCHINDUCTOR_CACHE_DIR": spec.model_cache.compile_cache_path or f"{cache}/torchinductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        **dict(sorted(settings.to_env().items())),
    }
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in own.items()]
    if spec.serving.auth.secret_ref is not None and spec.serving.auth.type == "APIKey":
        reference = {"secretKeyRef": {"name": spec.serving.auth.secret_ref.name, "key": API_KEYS_ENTRY}}
        variables.append({"name": "DRUMLINE_API_KEYS", "valueFrom": reference})
    given = [each.model_dump(by_alias=True, exclude_none=True) for each in spec.env]
    of_machine = (
        [each.model_dump(by_alias=True, exclude_none=True) for each in context.machine.env] if context.machine else []
    )
    return by_key(by_key(of_machine, variables, "name"), [_valued(each) for each in given], "name")


def _valued(variable: dict[str, Any]) -> dict[str, Any]:
    return variable if "valueFrom" in variable else {"name": variable["name"], "value": variable.get("value", "")}


def _resources(context: Context) -> dict[str, Any]:
    spec = context.app.spec
    limits: dict[str, Any] = dict(spec.resources.limits)
    result: dict[str, Any] = {"limits": limits, "requests": dict(spec.resources.requests)}
    if spec.num_gpus and spec.gpu.allocation == "DevicePlugin":
        limits[context.gpu_resource] = spec.num_gpus
    elif spec.num_gpus:
        result["claims"] = [{"name": "gpus"}]
    return {key: value for key, value in result.items() if value}


def shared_memory(context: Context) -> str:
    """Return the size of ``/dev/shm``: the app's own, else the MachineType's for each GPU, else 8Gi or 1Gi."""
    spec, machine = context.app.spec, context.machine
    if spec.shared_memory_size is not None:
        return str(spec.shared_memory_size)
    if spec.num_gpus and machine is not None and machine.shared_memory_size_per_gpu is not None:
        return quantity.times(machine.shared_memory_size_per_gpu, spec.num_gpus)
    return "8Gi" if spec.num_gpus else "1Gi"


def _volumes(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of the pod, and where the worker container sees them."""
    spec = context.app.spec
    cache, compiled = spec.model_cache, spec.model_cache.compile_cache_path
    claim = {"persistentVolumeClaim": {"claimName": cache.claim_name}} if cache.claim_name else {"emptyDir": {}}
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}, {"name": "cache", **claim}]
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        {"name": "cache", "mountPath": cache.mount_path},
    ]
    if quantity.parse(size := shared_memory(context)):
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - the pod's own
    if compiled and not f"{compiled}/".startswith((f"{cache.mount_path.rstrip('/')}/", "/tmp/")):  # noqa: S108
        volumes.append({"name": "compiled", "emptyDir": {}})
        mounts.append({"name": "compiled", "mountPath": compiled})
    if spec.source is not None:
        mount: dict[str, Any] = {"name": "source", "mountPath": SOURCE_PATH, "readOnly": True}
        if spec.source.config_map is not None:
            volumes.append({"name": "source", "configMap": {"name": spec.source.config_map.name}})
        elif spec.source.persistent_volume_claim is not None:
            held = spec.source.persistent_volume_claim
            volumes.append({"name": "source", "persistentVolumeClaim": {"claimName": held.claim_name}})
            if held.sub_path:
                mount["subPath"] = held.sub_path
        else:
            volumes.append({"name": "source", "emptyDir": {}})
            if spec.source.git is not None and spec.source.git.secret_ref is not None:
                volumes.append({"name": "credentials", "secret": {"secretName": spec.source.git.secret_ref.name}})
        mounts.append(mount)
    return volumes, mounts


def _fetch(context: Context, git: GitSource) -> dict[str, Any]:
    """The init container that fetches the code; its last words are git's own."""
    mounts: list[dict[str, Any]] = [
        {"name": "source", "mountPath": SOURCE_PATH},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
    ]
    if git.secret_ref is not None:
        mounts.append({"name": "credentials", "mountPath": _CREDENTIALS, "readOnly": True})
    own: dict[str, Any] = {}
    if context.app.spec.image_pull_policy and not context.settings.git_image:
        own["imagePullPolicy"] = (
            context.app.spec.image_pull_policy
        )  # else `:latest` is pulled, also where Never is asked for
    limits, requests = context.app.spec.resources.limits, context.app.spec.resources.requests
    if resources := {key: dict(each) for key, each in (("limits", limits), ("requests", requests)) if each}:
        own["resources"] = (
            resources  # a quota asks it of every container; init containers cost nothing beside the worker
        )
    return {
        "name": SOURCE_CONTAINER,
        "image": context.settings.git_image or context.image,
        **own,
        "command": ["sh", "-c", _FETCH],
        "env": [
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - the pod's own
            {"name": "GIT_TERMINAL_PROMPT", "value": "0"},
            {"name": "URL", "value": git.url},
            {"name": "REVISION", "value": git.revision},
        ],
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
