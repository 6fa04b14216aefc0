"""The custom resources of ``drumline.dev/v1alpha1`` as pydantic models: DistributedApp and MachineType.

Names are camelCase in YAML and snake_case in Python. Unknown fields are refused. ``drumline.api.manifests`` reads files
and turns an app into the runner's settings.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

GROUP: Final = "drumline.dev"
API_VERSION: Final = "drumline.dev/v1alpha1"

_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[int, Field(ge=1)]
_Quantity = Annotated[str, Field(pattern=r"^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$")]
_IntOrPercent = int | Annotated[str, Field(pattern=r"^[0-9]+%$")]
_Free = dict[str, Any]

_ACRONYMS = {
    "num_gpus": "numGPUs",
    "gpus_per_node": "gpusPerNode",
    "shared_memory_size_per_gpu": "sharedMemorySizePerGPU",
}


class _Model(BaseModel):
    """Closed, strict (YAML has types), immutable; spelt in camelCase outside."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        alias_generator=AliasGenerator(alias=lambda name: _ACRONYMS.get(name) or to_camel(name)),
    )


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that matters here; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        max_length=48, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", description="name of the app and of its Service"
    )
    namespace: str = Field(default="default", description="namespace of the app")


class LocalReference(_Model):
    """Name of an object in the same namespace."""

    name: str = Field(min_length=1, description="its name")


# --- DistributedApp


class ConfigMapSource(_Model):
    """Code from a ConfigMap."""

    name: str = Field(description="the ConfigMap; each key is a file")


class GitSource(_Model):
    """Code from a git repository."""

    url: str = Field(description="https or ssh URL")
    revision: str = Field(description="commit, tag or branch")
    path: str | None = Field(default=None, description="folder inside the repository; default: its root")
    secret_ref: LocalReference | None = Field(default=None, description="Secret with the credentials")


class VolumeSource(_Model):
    """Code from a PersistentVolumeClaim."""

    claim_name: str = Field(description="the claim")
    sub_path: str | None = Field(default=None, description="folder inside it")


class Source(_Model):
    """Where the code comes from when it is not in the image: exactly one of these."""

    config_map: ConfigMapSource | None = Field(default=None, description="files in a ConfigMap")
    git: GitSource | None = Field(default=None, description="a git repository")
    persistent_volume_claim: VolumeSource | None = Field(default=None, description="a volume")

    @model_validator(mode="after")
    def _one(self) -> Source:
        if sum(part is not None for part in (self.config_map, self.git, self.persistent_volume_claim)) != 1:
            raise ValueError("set exactly one of configMap, git, persistentVolumeClaim")
        return self


class Gpu(_Model):
    """How GPUs are asked for."""

    allocation: Literal["DevicePlugin", "ResourceClaim"] = Field(
        default="DevicePlugin", description="extended resource of a device plugin, or dynamic resource allocation"
    )
    resource_name: str = Field(default="nvidia.com/gpu", description="the extended resource")
    resource_claim_template_name: str | None = Field(default=None, description="needed for ResourceClaim")

    @model_validator(mode="after")
    def _claim(self) -> Gpu:
        if self.allocation == "ResourceClaim" and self.resource_claim_template_name is None:
            raise ValueError("resourceClaimTemplateName is required when allocation is ResourceClaim")
        return self


class Communication(_Model):
    """How ranks talk to each other."""

    backend: Literal["Auto", "NCCL", "Gloo"] = Field(
        default="Auto", description="torch.distributed backend; Auto: NCCL on GPUs, Gloo on CPUs"
    )


class EnvVar(_Model):
    """One environment variable of the worker container."""

    name: str = Field(min_length=1, description="its name")
    value: str | None = Field(default=None, description="its value")
    value_from: _Free | None = Field(default=None, description="EnvVarSource: where its value comes from")


class ModelCache(_Model):
    """A volume for model weights and compile caches."""

    claim_name: str | None = Field(default=None, description="PersistentVolumeClaim; default: the node's own disk")
    mount_path: str = Field(default="/data", description="where it appears in the container")
    compile_cache_path: str | None = Field(default=None, description="folder for torch.compile's cache")


class Auth(_Model):
    """Who may call the app."""

    type: Literal["None", "APIKey"] = Field(default="None", description="APIKey: callers send a key")
    secret_ref: LocalReference | None = Field(default=None, description="Secret whose values are the accepted keys")


class Serving(_Model):
    """The HTTP server and its limits."""

    port: int = Field(default=8080, ge=1, le=65535, description="port of the server")
    request_timeout_seconds: _Seconds = Field(default=3600, description="bound on one request's run time")
    startup_timeout_seconds: _Seconds = Field(default=1800, description="bound on setup() and the warm-up together")
    max_queue_depth: _Count = Field(default=64, description="waiting requests; one more is refused with 429")
    stream_keepalive_seconds: _Seconds = Field(default=15, description="longest silence in an event stream")
    auth: Auth = Field(default_factory=Auth, description="who may call the app")


class Rollout(_Model):
    """How a change reaches the pods."""

    type: Literal["RollingUpdate", "Recreate", "Auto"] = Field(default="Auto", description="Auto: rolling")
    max_surge: _IntOrPercent | None = Field(default=None, description="pods above replicas; default 0 with GPUs")
    max_unavailable: _IntOrPercent | None = Field(default=None, description="pods missing; default 1 with GPUs")
    partition: _Count | None = Field(default=None, description="replicas that keep the old revision")
    progress_deadline_seconds: _Seconds = Field(default=3600, description="a rollout without progress has failed")
    drain_timeout_seconds: _Count = Field(default=600, description="time for requests in flight when a pod stops")

    @model_validator(mode="after")
    def _recreate(self) -> Rollout:
        if self.type == "Recreate" and (self.max_surge is not None or self.max_unavailable is not None):
            raise ValueError("maxSurge and maxUnavailable do not apply to Recreate")
        return self


class FailurePolicy(_Model):
    """What happens when a rank dies or hangs."""

    type: Literal["RestartGroup", "RecreatePod", "None"] = Field(
        default="RestartGroup", description="RestartGroup: new ranks in the same pod; the others never restart ranks"
    )
    max_group_restarts: _Count = Field(default=10, description="restarts within the window before the pod gives up")
    window_seconds: _Seconds = Field(default=3600, description="length of the sliding window")
    hang_timeout_seconds: _Count = Field(
        default=900, description="a rank without a heartbeat for this long is hung; 0: never"
    )


class DistributedAppSpec(_Model):
    """What to run, on what, and how it is served."""

    worker_class: str = Field(
        max_length=253,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        description="module:Class of a DistributedWorker or an App; modules next to the manifest are found",
    )
    setup_args: _Free = Field(default_factory=dict, description="keyword arguments of setup()")
    warmup_payload: _Free | None = Field(default=None, description="a request that runs once before the app is ready")
    image: str | None = Field(default=None, max_length=512, description="container image")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="as in a pod"
    )
    image_pull_secrets: list[LocalReference] = Field(default_factory=list, max_length=8, description="as in a pod")
    source: Source | None = Field(default=None, description="code that is not in the image")
    num_gpus: int = Field(default=1, ge=0, le=1024, description="GPUs of one replica, one rank each; 0: a CPU app")
    world_size: int | None = Field(default=None, ge=1, le=1024, description="ranks of a CPU app")
    machine_type: str | None = Field(default=None, max_length=63, description="name or alias of a MachineType")
    gpu: Gpu = Field(default_factory=Gpu, description="how GPUs are asked for")
    communication: Communication = Field(default_factory=Communication, description="how ranks talk to each other")
    replicas: int = Field(default=1, ge=0, le=1000, description="pods, each with a group of ranks")
    resources: _Free = Field(default_factory=dict, description="requests and limits beside the GPUs, as in a pod")
    shared_memory_size: _Quantity | int | None = Field(default=None, description="size of /dev/shm")
    env: list[EnvVar] = Field(default_factory=list, max_length=256, description="environment variables")
    env_from: list[_Free] = Field(default_factory=list, max_length=32, description="as in a pod")
    model_cache: ModelCache = Field(default_factory=ModelCache, description="volume for weights")
    serving: Serving = Field(default_factory=Serving, description="the HTTP server and its limits")
    rollout: Rollout = Field(default_factory=Rollout, description="how a change reaches the pods")
    failure_policy: FailurePolicy = Field(default_factory=FailurePolicy, description="when a rank dies or hangs")
    suspend: bool = Field(default=False, description="true: no pods, everything else is kept")
    network_policy: Literal["Disabled", "DenyAllIngress"] = Field(
        default="Disabled", description="DenyAllIngress: only the pods that need it reach the app"
    )
    pod_template: _Free | None = Field(default=None, description="merged over the pod that the operator makes")

    @model_validator(mode="after")
    def _consistent(self) -> DistributedAppSpec:
        if self.world_size is not None and self.num_gpus not in (0, self.world_size):
            raise ValueError("worldSize is for CPU apps (numGPUs: 0); with GPUs it is numGPUs")
        if self.communication.backend == "NCCL" and self.num_gpus == 0:
            raise ValueError("communication.backend NCCL needs numGPUs > 0; use Gloo for CPU apps")
        return self


class DistributedApp(_Model):
    """N ranks per replica behind invoke and stream endpoints."""

    api_version: Literal["drumline.dev/v1alpha1"]
    kind: Literal["DistributedApp"]
    metadata: Metadata
    spec: DistributedAppSpec
    status: _Free | None = Field(default=None, description="written by the operator")


# --- MachineType


class MachineTypeSpec(_Model):
    """Nodes of one kind."""

    resource_name: str = Field(default="nvidia.com/gpu", description="extended resource of its GPUs")
    gpus_per_node: int = Field(default=8, ge=0, le=64, description="GPUs of one node")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels of its nodes")
    tolerations: list[_Free] = Field(default_factory=list, description="as in a pod")
    runtime_class_name: str | None = Field(default=None, description="as in a pod")
    shared_memory_size_per_gpu: _Quantity | int | None = Field(default=None, description="shared memory for each GPU")
    env: list[EnvVar] = Field(default_factory=list, max_length=256, description="variables of every app on it")
    aliases: list[str] = Field(default_factory=list, max_length=32, description="other names, e.g. GPU-H100")


class MachineType(_Model):
    """A kind of machine that apps ask for by name."""

    api_version: Literal["drumline.dev/v1alpha1"]
    kind: Literal["MachineType"]
    metadata: Metadata
    spec: MachineTypeSpec
    status: _Free | None = Field(default=None, description="written by the operator")
