"""A MachineType's status: how many nodes it has, and their GPUs. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from drumline.api.manifests import sentences
from drumline.api.status import MachineTypeStatus
from drumline.api.v1alpha1 import MachineTypeSpec
from drumline_operator import reasons
from drumline_operator.machine_types import gpus_of, matching
from drumline_operator.observe import NodeView
from drumline_operator.status import Verdict, conditions


def machine_status(raw: Mapping[str, Any], nodes: Sequence[NodeView] | None, now: datetime) -> dict[str, Any]:
    """Return the status of a MachineType.

    Args:
        raw: the MachineType as the API server has it.
        nodes: all nodes; None when the operator may not see them.
        now: for conditions that change.
    """
    found: int | None = None
    gpus: int | None = None
    verdict: Verdict
    try:
        spec = MachineTypeSpec.model_validate(raw.get("spec") or {}, by_name=False)
    except ValidationError as error:
        words = "; ".join(f"spec.{each}" for each in sentences(error, MachineTypeSpec))
        verdict = ("False", reasons.INVALID_SPEC, f"{words} ({reasons.CURES[reasons.INVALID_SPEC]})")
    else:
        if nodes is None:
            verdict = ("Unknown", reasons.NOT_KNOWN, "the operator may not list nodes")
        else:
            fitting = matching(spec, nodes)
            found, gpus = len(fitting), sum(gpus_of(node, spec.resource_name) for node in fitting)
            said = f"{raw['metadata']['name']} has {found} nodes with {gpus} {spec.resource_name}"
            verdict = ("True", reasons.NODES_FOUND, said) if found else ("False", reasons.NO_NODES, said)
    status = MachineTypeStatus(
        observed_generation=raw["metadata"].get("generation", 0),
        nodes=found,
        allocatable_gpus=gpus,
        conditions=conditions(raw, {"Available": verdict}, now),
    )
    return status.model_dump(by_alias=True, exclude_none=True)
