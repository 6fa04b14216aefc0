"""Reasons of conditions: CamelCase words that people and programs may rely on. LEAF.

A reason is never renamed. ``CURES`` says what to do about those that stand for trouble, ``MEANINGS`` what each one says;
``docs/reference/status.md`` is made from both.
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
NODES_FOUND: Final = "NodesFound"

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
CANNOT_START: Final = "ContainerCannotStart"
WORKER_EXITED: Final = "WorkerExited"
EVICTED: Final = "Evicted"
REFUSED_BY_NODE: Final = "RefusedByNode"
NODE_SHUTDOWN: Final = "NodeShutdown"
MOUNT_FAILED: Final = "MountFailed"
SANDBOX_FAILED: Final = "SandboxFailed"
DEADLINE: Final = "ProgressDeadlineExceeded"

CURES: Final = {
    NO_NODES: "label the nodes as spec.nodeSelector wants, or correct it; `kubectl get nodes --show-labels` shows labels",
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
    CANNOT_START: "the image must have drumline: build it FROM drumline's worker image, and keep its entry point",
    CRASH_LOOP: "see status.lastFailure and `kubectl logs --previous`",
    WORKER_EXITED: "see status.lastFailure and `kubectl logs --previous`",
    EVICTED: "the node ran short of a resource: set spec.resources.requests",
    REFUSED_BY_NODE: "see the kubelet's words; a node whose devices are broken, or taken by others, should be cordoned",
    NODE_SHUTDOWN: "nothing to do where other nodes can run the app; else bring the node back",
    MOUNT_FAILED: "create the Secret, ConfigMap, key or volume that the message names, or correct its name in the spec",
    SANDBOX_FAILED: "see the kubelet's words; the node's network plugin and the MachineType's runtimeClassName must work",
    DEADLINE: "see RanksReady and Scheduled for the cause; raise spec.rollout.progressDeadlineSeconds if it is only slow",
}

MEANINGS: Final = {
    SERVING: "enough groups are ready, at least one of them with the wanted revision",
    SCALED_TO_ZERO: "nothing runs, as spec.replicas says",
    SUSPENDED: "nothing runs, as spec.suspend says; everything else is kept",
    NOT_SUSPENDED: "spec.suspend is false",
    NOT_FAILED: "nothing has failed for good; what does not work now may still pass",
    COMPLETE: "every pod has the wanted revision and is ready",
    NEW_REVISION: "pods of an older revision are being replaced",
    SCALING: "pods are being added or removed",
    STARTING: "the pods or their containers are being made",
    LOADING_MODEL: "the ranks run setup() and the warm-up",
    PODS_BOUND: "every pod has a node",
    SOURCE_FOUND: "image and code are there",
    RANKS_READY: "every rank of every ready group has passed setup() and the warm-up",
    ENOUGH_REPLICAS: "as many groups are ready as the rollout needs at least, of whatever revision",
    TOO_FEW_REPLICAS: "fewer groups are ready than the rollout needs at least",
    NOT_KNOWN: "not judged, because of something that another condition names",
    NODES_FOUND: "schedulable nodes carry the labels of the MachineType",
    INVALID_SPEC: "the spec has a mistake that the API server could not see; the app is left as it was",
    NAME_TAKEN: "an object that the app needs exists already and belongs to somebody else; it is left alone",
    REFUSED: "the API server does not take an object that the app needs",
    NO_NODES: "no schedulable node carries the labels of the MachineType",
    NO_MACHINE: "no MachineType of that name or alias can run the app, or it has no nodes",
    INSUFFICIENT_GPUS: "no node has so many free GPUs",
    UNSCHEDULABLE: "the scheduler finds no node for another reason than GPUs",
    QUOTA_EXCEEDED: "a quota of the namespace forbids the pods",
    PODS_REFUSED: "the API server or an admission webhook does not let the pods be made",
    CONFIG_MAP_NOT_FOUND: "the ConfigMap of spec.source does not exist; it is looked for again by itself",
    GIT_FETCH_FAILED: "the container that fetches spec.source.git failed",
    IMAGE_PULL_FAILED: "a node cannot get the image",
    CLASS_NOT_FOUND: "the module cannot be imported, or has no such class",
    CONFIG_ERROR: "the container cannot be made, or a setting of drumline is wrong",
    SETUP_FAILED: "setup() or the warm-up raised on a rank",
    OUT_OF_MEMORY: "the kernel ended the worker container at its memory limit",
    RANK_FAILED: "a rank's process ended, or user code failed outside of a request; the group starts anew",
    RANK_HUNG: "a rank gave no sign of life for hangTimeoutSeconds; the group starts anew",
    CANNOT_START: "the runtime cannot run the worker container's command",
    CRASH_LOOP: "the worker container ends again and again; Kubernetes waits longer each time",
    WORKER_EXITED: "the worker container ended with an error",
    EVICTED: "the node's kubelet removed the pod, because the node ran short of memory, disk or process ids",
    REFUSED_BY_NODE: "the node's kubelet does not take the pod that the scheduler gave it; another pod is made",
    NODE_SHUTDOWN: "the node shuts down; another pod is made",
    MOUNT_FAILED: "the node cannot mount a volume of the pod; it is tried again by itself",
    SANDBOX_FAILED: "the node cannot make the pod's sandbox, such as its network; it is tried again by itself",
    DEADLINE: "a rollout has made no progress for progressDeadlineSeconds",
}
