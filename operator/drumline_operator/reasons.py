"""Reasons of conditions: CamelCase words that people and programs may rely on. LEAF.

A reason is never renamed. ``CURES`` says what to do about those that stand for trouble.
"""

from __future__ import annotations

from typing import Final

SERVING: Final = "Serving"
SCALED_TO_ZERO: Final = "ScaledToZero"
SUSPENDED: Final = "Suspended"
NOT_SUSPENDED: Final = "NotSuspended"
NOT_FAILED: Final = "NotFailed"
COMPLETE: Final = "Complete"
NEW_REVISION: Final = "NewRevision"
SCALING: Final = "Scaling"
STARTING: Final = "Starting"
LOADING_MODEL: Final = "LoadingModel"
PODS_BOUND: Final = "PodsBound"
SOURCE_FOUND: Final = "SourceFound"
RANKS_READY: Final = "RanksReady"
ENOUGH_REPLICAS: Final = "MinimumReplicasAvailable"
TOO_FEW_REPLICAS: Final = "MinimumReplicasUnavailable"
NOT_KNOWN: Final = "NotKnown"

INVALID_SPEC: Final = "InvalidSpec"
NAME_TAKEN: Final = "NameTaken"
REFUSED: Final = "RefusedByServer"
NO_NODES: Final = "NoNodes"
NO_MACHINE: Final = "NoMatchingMachineType"
INSUFFICIENT_GPUS: Final = "InsufficientGPUs"
UNSCHEDULABLE: Final = "Unschedulable"
QUOTA_EXCEEDED: Final = "QuotaExceeded"
PODS_REFUSED: Final = "PodsRefused"
CONFIG_MAP_NOT_FOUND: Final = "ConfigMapNotFound"
GIT_FETCH_FAILED: Final = "GitFetchFailed"
IMAGE_PULL_FAILED: Final = "ImagePullFailed"
CLASS_NOT_FOUND: Final = "ClassNotFound"
CONFIG_ERROR: Final = "ConfigError"
SETUP_FAILED: Final = "SetupFailed"
OUT_OF_MEMORY: Final = "OutOfMemory"
RANK_FAILED: Final = "RankFailed"
RANK_HUNG: Final = "RankHung"
CRASH_LOOP: Final = "CrashLoop"
WORKER_EXITED: Final = "WorkerExited"
EVICTED: Final = "Evicted"
DEADLINE: Final = "ProgressDeadlineExceeded"

CURES: Final = {
    INVALID_SPEC: "correct the field that the message names",
    NAME_TAKEN: "rename the app, or remove the object that has its name",
    REFUSED: "correct what the API server names, mostly in spec.podTemplate or spec.envFrom",
    NO_MACHINE: "create the MachineType or correct spec.machineType; `kubectl get mt` lists them",
    INSUFFICIENT_GPUS: "free GPUs, add nodes, or ask for fewer with spec.numGPUs",
    UNSCHEDULABLE: "see the scheduler's words in the message",
    QUOTA_EXCEEDED: "raise the namespace's quota or ask for less",
    PODS_REFUSED: "see the API server's words; a namespace's Pod Security level may forbid spec.podTemplate",
    CONFIG_MAP_NOT_FOUND: "create the ConfigMap or correct spec.source.configMap.name",
    GIT_FETCH_FAILED: "correct spec.source.git; git's own words are in the message",
    IMAGE_PULL_FAILED: "correct spec.image or spec.imagePullSecrets",
    CLASS_NOT_FOUND: "correct spec.workerClass (module:Class); the module must be in the image or in spec.source",
    CONFIG_ERROR: "correct the setting, Secret or ConfigMap that the message names",
    SETUP_FAILED: "setup() raised; see the traceback in status.lastFailure",
    OUT_OF_MEMORY: "raise spec.resources.limits.memory; /dev/shm counts, too",
    RANK_FAILED: "see status.lastFailure",
    RANK_HUNG: "see status.lastFailure, and spec.failurePolicy.hangTimeoutSeconds for slow steps",
    CRASH_LOOP: "see status.lastFailure and `kubectl logs --previous`",
    WORKER_EXITED: "see status.lastFailure and `kubectl logs --previous`",
    EVICTED: "the node ran short of a resource: set spec.resources.requests",
    DEADLINE: "see RanksReady and Scheduled for the cause; raise spec.rollout.progressDeadlineSeconds if it is only slow",
}
