"""What the operator writes into ``status`` of a DistributedApp and of a MachineType, as pydantic models.

Every model here is written, never read back for a decision: state is recomputed from what is observed.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from drumline.api.v1alpha1 import ApiModel

#: Kubernetes' own limits are wider; a status stays readable, and small enough to be watched.
MESSAGE_LIMIT: Final = 4096
GROUPS_LIMIT: Final = 64

_Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
_Generation = Annotated[int, Field(json_schema_extra={"format": "int64"})]

#: Types of DistributedApp's conditions, in the order in which they are shown.
APP_CONDITIONS: Final = (
    "Ready",
    "Available",
    "Progressing",
    "Scheduled",
    "SourceReady",
    "RanksReady",
    "Suspended",
    "Failed",
)


class Condition(ApiModel):
    """One condition, as in ``metav1.Condition``."""

    type: str = Field(max_length=316, description="what is judged")
    status: Literal["True", "False", "Unknown"] = Field(description="the verdict")
    reason: str = Field(
        min_length=1,
        max_length=1024,
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="why, in one CamelCase word; documented and stable",
    )
    message: str = Field(max_length=32768, description="why, in words, and what to do")
    observed_generation: _Generation = Field(default=0, ge=0, description="metadata.generation that was judged")
    last_transition_time: _Time = Field(description="when the verdict last changed")


class LastFailure(ApiModel):
    """The last time that a container or a rank failed."""

    pod_name: str | None = Field(default=None, description="the pod")
    rank: int | None = Field(default=None, description="the rank, where one is to blame")
    exit_code: int | None = Field(default=None, description="exit code of the rank or of the container")
    signal: str | None = Field(default=None, description="signal that ended it, e.g. SIGKILL")
    reason: str | None = Field(default=None, max_length=1024, description="why, in one word")
    message: str | None = Field(default=None, max_length=MESSAGE_LIMIT, description="its own last words, shortened")
    time: _Time | None = Field(default=None, description="when")


class GroupStatus(ApiModel):
    """One replica: a pod with its group of ranks."""

    name: str = Field(description="name of the group; today the pod's")
    pod_name: str | None = Field(default=None, description="the pod")
    node_name: str | None = Field(default=None, description="where it runs")
    revision: str | None = Field(default=None, description="revision of the app that it runs")
    ready_ranks: int | None = Field(default=None, ge=0, description="ranks that passed setup() and the warm-up")
    world_size: int | None = Field(default=None, ge=0, description="ranks of the group")
    restarts: int | None = Field(default=None, ge=0, description="times that the runner restarted its ranks")
    state: str | None = Field(default=None, description="Pending, Starting, Serving, Restarting, Draining or Failed")


class DistributedAppStatus(ApiModel):
    """State of a DistributedApp, as last observed."""

    observed_generation: _Generation | None = Field(default=None, description="metadata.generation that was judged")
    replicas: int | None = Field(default=None, description="pods that exist")
    ready_replicas: int | None = Field(default=None, description="pods whose ranks are all ready")
    available_replicas: int | None = Field(default=None, description="ready pods that count for the rollout")
    updated_replicas: int | None = Field(default=None, description="pods of the wanted revision")
    summary: str | None = Field(default=None, description="ready pods/wanted pods, e.g. 1/2")
    selector: str | None = Field(default=None, description="label selector of the pods, for /scale")
    url: str | None = Field(default=None, description="address of the Service inside the cluster")
    current_revision: str | None = Field(default=None, description="revision that serves")
    update_revision: str | None = Field(default=None, description="revision that is wanted")
    group_restarts: int | None = Field(default=None, description="restarts of ranks in the pods that exist")
    last_failure: LastFailure | None = Field(default=None, description="the last failure that is still known")
    groups: list[GroupStatus] = Field(default_factory=list, max_length=GROUPS_LIMIT, description="one per pod")
    conditions: list[Condition] = Field(default_factory=list, max_length=32, description="verdicts; wait for Ready")


class MachineTypeStatus(ApiModel):
    """State of a MachineType, as last observed."""

    observed_generation: _Generation | None = Field(default=None, description="metadata.generation that was judged")
    nodes: int | None = Field(default=None, ge=0, description="schedulable nodes that match nodeSelector")
    allocatable_gpus: int | None = Field(default=None, ge=0, description="GPUs of those nodes, used or not")
    conditions: list[Condition] = Field(default_factory=list, max_length=32, description="verdicts; Available")
