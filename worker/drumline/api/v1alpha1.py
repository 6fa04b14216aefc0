"""The custom resources of ``drumline.dev/v1alpha1`` as pydantic models: DistributedApp and MachineType.

Names are camelCase in YAML and snake_case in Python. Unknown fields are refused. ``drumline.api.manifests`` reads files
and turns an app into the runner's settings.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, AliasGenerator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from drumline.api.forms import (
    AbsolutePath,
    Amount,
    AppName,
    ClassReference,
    FolderInside,
    GitRevision,
    GitUrl,
    Image,
    IntOrPercent,
    MachineName,
    ObjectName,
    ResourceName,
    VariableName,
)

GROUP: Final = "drumline.dev"
API_VERSION: Final = "drumline.dev/v1alpha1"

_Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
#: Kubernetes keeps some of these in 32 bits.
_Seconds = Annotated[int, Field(ge=1, le=1_000_000_000)]
_SecondsOrZero = Annotated[int, Field(ge=0, le=1_000_000_000)]
_Free = dict[str, Any]
#: Folders of every pod that no cache may cover.
TAKEN: Final = "/(tmp|dev|dev/shm|proc|sys|etc|usr|bin|sbin|lib|lib64)/?|/(source|credentials)(/.*)?"
_TAKEN: Final = re.compile(TAKEN)

_ACRONYMS = {
    "num_gpus": "numGPUs",
    "gpus_per_node": "gpusPerNode",
    "allocatable_gpus": "allocatableGPUs",
    "shared_memory_size_per_gpu": "sharedMemorySizePerGPU",
}


def yaml_name(name: str) -> str:
    """Return how the field ``name`` is spelt in YAML, e.g. ``num_gpus`` -> ``numGPUs``."""
    return _ACRONYMS.get(name) or to_camel(name)


class ApiModel(BaseModel):
    """Closed, strict (YAML has types), immutable; spelt in camelCase outside."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        alias_generator=AliasGenerator(alias=yaml_name),
    )


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that matters here; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: AppName = Field(description="name of the app and of its Service")
    namespace: str = Field(default="default", description="namespace of the app")


class MachineMetadata(BaseModel):
    """The same of an object without a namespace, to which no Service belongs."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: ObjectName = Field(max_length=63, description="name of the machine type")


class LocalReference(ApiModel):
    """Name of an object in the same namespace."""

    name: ObjectName = Field(description="its name")


# --- DistributedApp


class ConfigMapSource(ApiModel):
    """Code from a ConfigMap."""

    name: ObjectName = Field(description="the ConfigMap; each key is a file")


class GitSource(ApiModel):
    """Code from a git repository."""

    url: GitUrl = Field(description="https or ssh URL")
    revision: GitRevision = Field(description="commit, tag or branch")
    path: FolderInside | None = Field(default=None, description="folder inside the repository; default: its root")
    secret_ref: LocalReference | None = Field(
        default=None,
        description="Secret with username and password (https), or ssh-privatekey and known_hosts (ssh)",
    )


class VolumeSource(ApiModel):
    """Code from a PersistentVolumeClaim."""

    claim_name: ObjectName = Field(description="the claim")
    sub_path: FolderInside | None = Field(default=None, description="folder inside it")


class Source(ApiModel):
    """Where the code comes from when it is not in the image: exactly one of these."""

    config_map: ConfigMapSource | None = Field(default=None, description="files in a ConfigMap")
    git: GitSource | None = Field(default=None, description="a git repository")
    persistent_volume_claim: VolumeSource | None = Field(default=None, description="a volume")

    @model_validator(mode="after")
    def _one(self) -> Source:
        if sum(part is not None for part in (self.config_map, self.git, self.persistent_volume_claim)) != 1:
            raise ValueError("set exactly one of configMap, git, persistentVolumeClaim")
        return self


class Gpu(ApiModel):
    """How GPUs are asked for."""

    allocation: Literal["DevicePlugin", "ResourceClaim"] = Field(
        default="DevicePlugin", description="extended resource of a device plugin, or dynamic resource allocation"
    )
    resource_name: ResourceName | None = Field(
        default=None, description="the extended resource; default: the MachineType's, else nvidia.com/gpu"
    )
    resource_claim_template_name: ObjectName | None = Field(default=None, description="needed for ResourceClaim")

    @model_validator(mode="after")
    def _claim(self) -> Gpu:
        if self.allocation == "ResourceClaim" and self.resource_claim_template_name is None:
            raise ValueError("resourceClaimTemplateName is required when allocation is ResourceClaim")
        return self


class Communication(ApiModel):
    """How ranks talk to each other."""

    backend: Literal["Auto", "NCCL", "Gloo"] = Field(
        default="Auto", description="torch.distributed backend; Auto: NCCL on GPUs, Gloo on CPUs"
    )
    timeout_seconds: _Seconds = Field(
        default=86400,
        description="bound on one collective of the ranks' process group; by default, a day, failurePolicy's and "
        "serving's time-outs come first",
    )


class EnvVar(ApiModel):
    """One environment variable of the worker container."""

    name: VariableName = Field(description="its name")
    value: str | None = Field(default=None, description="its value")
    value_from: _Free | None = Field(default=None, description="EnvVarSource: where its value comes from")

    @model_validator(mode="after")
    def _one(self) -> EnvVar:
        if self.value is not None and self.value_from is not None:
            raise ValueError(f"{self.name}: set value or valueFrom, not both")
        return self


def _distinct(variables: list[EnvVar]) -> list[EnvVar]:
    names = [variable.name for variable in variables]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: set more than once; keep one")
    return variables


_Env = Annotated[list[EnvVar], AfterValidator(_distinct), Field(max_length=256)]
_Amounts = Annotated[dict[str, Amount], Field(max_length=32)]


class Resources(ApiModel):
    """CPU, memory and other resources of the worker container."""

    requests: _Amounts = Field(default_factory=dict, description="what the scheduler sets aside, e.g. memory: 64Gi")
    limits: _Amounts = Field(default_factory=dict, description="what the container may use at most")


class ModelCache(ApiModel):
    """A volume for model weights and compile caches."""

    claim_name: ObjectName | None = Field(
        default=None, description="PersistentVolumeClaim; default: a folder that lives as long as the pod"
    )
    mount_path: AbsolutePath = Field(
        default="/data", description="where it appears in the container; XDG_CACHE_HOME is in it"
    )
    compile_cache_path: AbsolutePath | None = Field(
        default=None, description="folder for torch.compile's cache (TORCHINDUCTOR_CACHE_DIR)"
    )

    @model_validator(mode="after")
    def _free(self) -> ModelCache:
        for field in ("mount_path", "compile_cache_path"):
            if _TAKEN.fullmatch(getattr(self, field) or ""):
                raise ValueError(f"{yaml_name(field)} is a folder that the pod needs for something else; use /data")
        return self


class Auth(ApiModel):
    """Who may call the app."""

    type: Literal["None", "APIKey"] = Field(default="None", description="APIKey: callers send a key")
    secret_ref: LocalReference | None = Field(
        default=None, description="Secret whose entry api-keys is a JSON list of the accepted keys; needed for APIKey"
    )

    @model_validator(mode="after")
    def _keys(self) -> Auth:
        if self.type == "APIKey" and self.secret_ref is None:
            raise ValueError("secretRef is required when type is APIKey; name a Secret with an entry api-keys")
        return self


class Serving(ApiModel):
    """The HTTP server and its limits."""

    port: int = Field(default=8080, ge=1, le=65535, description="port of the server")
    request_timeout_seconds: _Seconds = Field(default=3600, description="bound on one request's run time")
    startup_timeout_seconds: _Seconds = Field(default=1800, description="bound on setup() and the warm-up together")
    max_queue_depth: _Count = Field(default=64, description="waiting requests; one more is refused with 429")
    stream_keepalive_seconds: _Seconds = Field(default=15, description="longest silence in an event stream")
    auth: Auth = Field(default_factory=Auth, description="who may call the app")


class Rollout(ApiModel):
    """How a change reaches the pods."""

    type: Literal["RollingUpdate", "Recreate", "Auto"] = Field(default="Auto", description="Auto: rolling")
    max_surge: IntOrPercent | None = Field(default=None, description="pods above replicas; default 0 with GPUs")
    max_unavailable: IntOrPercent | None = Field(default=None, description="pods missing; default 1 with GPUs")
    progress_deadline_seconds: _Seconds = Field(default=3600, description="a rollout without progress has failed")
    drain_timeout_seconds: _SecondsOrZero = Field(
        default=600, description="time for requests in flight when a pod stops"
    )

    @model_validator(mode="after")
    def _recreate(self) -> Rollout:
        if self.type == "Recreate" and (self.max_surge is not None or self.max_unavailable is not None):
            raise ValueError("maxSurge and maxUnavailable do not apply to Recreate; remove them")
        if self.max_surge in (0, "0%") and self.max_unavailable in (0, "0%"):
            raise ValueError("maxSurge and maxUnavailable cannot both be 0: no pod could be replaced; set one to 1")
        return self


class FailurePolicy(ApiModel):
    """What happens when a rank dies or hangs."""

    type: Literal["RestartGroup", "RecreatePod"] = Field(
        default="RestartGroup",
        description="RestartGroup: new ranks in the same pod. RecreatePod: ranks never restart; the pod is replaced",
    )
    max_group_restarts: _Count = Field(default=10, description="restarts within the window before the pod gives up")
    window_seconds: _Seconds = Field(default=3600, description="length of the sliding window")
    hang_timeout_seconds: _SecondsOrZero = Field(
        default=900, description="a rank without a heartbeat for this long is hung; 0: never"
    )


class PodMetadata(ApiModel):
    """Labels and annotations of the pods."""

    labels: dict[str, str] = Field(default_factory=dict, description="added to the pods' labels")
    annotations: dict[str, str] = Field(default_factory=dict, description="added to the pods' annotations")


class PodTemplate(ApiModel):
    """What is merged over the pods: objects field by field, lists of named things by name (a strategic merge)."""

    metadata: PodMetadata = Field(default_factory=PodMetadata, description="labels and annotations of the pods")
    spec: _Free = Field(default_factory=dict, description="PodSpec; as in a pod")


class DistributedAppSpec(ApiModel):
    """What to run, on what, and how it is served."""

    worker_class: ClassReference = Field(
        description="module:Class of a DistributedWorker or an App; modules next to the manifest are found"
    )
    setup_args: _Free = Field(default_factory=dict, description="keyword arguments of setup()")
    warmup_payload: _Free | None = Field(default=None, description="a request that runs once before the app is ready")
    image: Image | None = Field(default=None, description="container image")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="as in a pod"
    )
    image_pull_secrets: list[LocalReference] = Field(default_factory=list, max_length=8, description="as in a pod")
    source: Source | None = Field(default=None, description="code that is not in the image")
    num_gpus: int = Field(default=1, ge=0, le=1024, description="GPUs of one replica, one rank each; 0: a CPU app")
    world_size: int | None = Field(default=None, ge=1, le=1024, description="ranks of a CPU app")
    machine_type: MachineName | None = Field(default=None, description="name or alias of a MachineType")
    gpu: Gpu = Field(default_factory=Gpu, description="how GPUs are asked for")
    communication: Communication = Field(default_factory=Communication, description="how ranks talk to each other")
    replicas: int = Field(default=1, ge=0, le=1000, description="pods, each with a group of ranks")
    resources: Resources = Field(
        default_factory=Resources, description="requests and limits beside the GPUs, as in a pod"
    )
    shared_memory_size: Amount | None = Field(
        default=None, description="size of /dev/shm; default: the MachineType's, else 8Gi with GPUs and 1Gi without"
    )
    env: _Env = Field(default_factory=list, description="environment variables; DRUMLINE_* win over other fields")
    env_from: list[_Free] = Field(default_factory=list, max_length=32, description="as in a pod")
    model_cache: ModelCache = Field(default_factory=ModelCache, description="volume for weights")
    serving: Serving = Field(default_factory=Serving, description="the HTTP server and its limits")
    rollout: Rollout = Field(default_factory=Rollout, description="how a change reaches the pods")
    failure_policy: FailurePolicy = Field(default_factory=FailurePolicy, description="when a rank dies or hangs")
    suspend: bool = Field(default=False, description="true: no pods, everything else is kept")
    network_policy: Literal["Disabled", "DenyAllIngress"] = Field(
        default="Disabled",
        description="DenyAllIngress: only the operator, and pods or namespaces labelled drumline.dev/client: 'true', "
        "reach the app",
    )
    pod_template: PodTemplate | None = Field(
        default=None, description="merged over the pod that the operator makes; its container is called worker"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DistributedAppSpec:
        if self.world_size is not None and self.num_gpus not in (0, self.world_size):
            raise ValueError("worldSize is for CPU apps (numGPUs: 0); with GPUs it is numGPUs")
        if self.gpu.allocation == "ResourceClaim" and self.num_gpus == 0:
            raise ValueError("gpu.allocation ResourceClaim needs numGPUs > 0; remove gpu from CPU apps")
        gpus = {"nvidia.com/gpu", self.gpu.resource_name} & {*self.resources.requests, *self.resources.limits}
        if gpus:
            raise ValueError(f"resources: GPUs are asked for with numGPUs; remove {gpus.pop()}")
        if self.communication.backend == "NCCL" and self.num_gpus == 0:
            raise ValueError("communication.backend NCCL needs numGPUs > 0; use Gloo for CPU apps")
        return self


class DistributedApp(ApiModel):
    """N ranks per replica behind invoke and stream endpoints."""

    api_version: Literal["drumline.dev/v1alpha1"]
    kind: Literal["DistributedApp"]
    metadata: Metadata
    spec: DistributedAppSpec
    status: _Free | None = Field(default=None, description="written by the operator")


# --- MachineType


class MachineTypeSpec(ApiModel):
    """Nodes of one kind."""

    resource_name: ResourceName = Field(default="nvidia.com/gpu", description="extended resource of its GPUs")
    gpus_per_node: int = Field(default=8, ge=0, le=64, description="GPUs of one node")
    node_selector: dict[str, str] = Field(default_factory=dict, max_length=32, description="labels of its nodes")
    tolerations: list[_Free] = Field(default_factory=list, max_length=32, description="as in a pod")
    runtime_class_name: ObjectName | None = Field(default=None, description="as in a pod")
    shared_memory_size_per_gpu: Amount | None = Field(default=None, description="shared memory for each GPU")
    env: _Env = Field(default_factory=list, description="variables of every app on it; the app's own win")
    aliases: list[MachineName] = Field(default_factory=list, max_length=32, description="other names, e.g. GPU-H100")


class MachineType(ApiModel):
    """A kind of machine that apps ask for by name."""

    api_version: Literal["drumline.dev/v1alpha1"]
    kind: Literal["MachineType"]
    metadata: MachineMetadata
    spec: MachineTypeSpec
    status: _Free | None = Field(default=None, description="written by the operator")
