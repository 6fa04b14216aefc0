"""What every builder is given, and what every child has in common. PURE."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from drumline.api.v1alpha1 import API_VERSION, DistributedApp, MachineTypeSpec
from drumline_operator.manifests import labels
from drumline_operator.manifests.names import API_VERSIONS
from drumline_operator.settings import OperatorSettings

#: Fields that change how many pods there are, and how they are replaced, but not the pods.
_NOT_IN_PODS: Final = {"replicas", "suspend", "network_policy"}
_ROLLOUT_OF_PODS: Final = {"drain_timeout_seconds"}


@dataclass(frozen=True)
class Context:
    """One app and what is known about its pods' surroundings.

    Attributes:
        app: the app, validated.
        uid: of the app, for owner references.
        machine: its MachineType's spec.
        source_digest: of the ConfigMap with its code; a new one is a new revision.
        settings: the operator's own.
    """

    app: DistributedApp
    uid: str
    settings: OperatorSettings
    machine: MachineTypeSpec | None = None
    source_digest: str = ""

    @property
    def name(self) -> str:
        """The app's name, which its children share."""
        return self.app.metadata.name

    @property
    def image(self) -> str:
        """The worker container's image."""
        return self.app.spec.image or self.settings.worker_image

    @property
    def gpu_resource(self) -> str:
        """The extended resource of its GPUs."""
        return self.app.spec.gpu.resource_name or (self.machine.resource_name if self.machine else "nvidia.com/gpu")

    @cached_property
    def inputs(self) -> str:
        """Return a hash of all that the pods are made from.

        Fields at their default do not count, and the operator's version does not: an upgrade restarts nothing.
        """
        spec = self.app.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_NOT_IN_PODS)
        rollout = self.app.spec.rollout.model_dump(
            mode="json", by_alias=True, exclude_defaults=True, include=_ROLLOUT_OF_PODS
        )
        spec = {**spec, "rollout": rollout}
        machine = None
        if self.machine is not None:
            machine = self.machine.model_dump(
                mode="json", by_alias=True, exclude_defaults=True, exclude={"aliases", "gpus_per_node"}
            )
        document = [spec, machine, self.source_digest, self.image]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @property
    def revision(self) -> str:
        """Short name of what the pods are made from."""
        return self.inputs[:10]

    def child(self, kind: str, spec: dict[str, Any], annotations: dict[str, str] | None = None) -> dict[str, Any]:
        """Return a manifest with what all children have: the name, labels, and the app as owner."""
        owner = {
            "apiVersion": API_VERSION,
            "kind": "DistributedApp",
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata: dict[str, Any] = {
            "name": self.name,
            "namespace": self.app.metadata.namespace,
            "labels": labels.common(self.name),
            "ownerReferences": [owner],
        }
        if annotations:
            metadata["annotations"] = annotations
        return {"apiVersion": API_VERSIONS[kind], "kind": kind, "metadata": metadata, "spec": spec}
