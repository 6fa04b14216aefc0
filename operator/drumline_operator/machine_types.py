"""Which machine an app asks for: MachineTypes by name or alias. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from drumline.api.manifests import sentences
from drumline.api.v1alpha1 import DistributedAppSpec, MachineTypeSpec
from drumline.details import did_you_mean
from drumline_operator import quantity
from drumline_operator.observe import NodeView

#: Keys of MachineTypes in the queue: they have no namespace.
MACHINE_TYPE_PREFIX: Final = "machinetype:"


_MOST_COUNTED: Final = 100
_counted: Final[dict[tuple[object, ...], tuple[Sequence[NodeView], tuple[int, int]]]] = {}


@dataclass(frozen=True)
class Machine:
    """The MachineType of an app. ``warning``: why its pods cannot run now, e.g. that it has no node."""

    name: str
    spec: MachineTypeSpec
    warning: str = ""


@dataclass(frozen=True)
class NoMachine:
    """No MachineType fits; ``message`` says why and what to do."""

    message: str


def resolve(
    app: DistributedAppSpec, machine_types: Sequence[Mapping[str, Any]], nodes: Sequence[NodeView] | None
) -> Machine | NoMachine | None:
    """Return the machine that ``app`` names, or None when it names none.

    Args:
        app: the app's spec.
        machine_types: all MachineTypes, as the API server has them.
        nodes: all nodes; None when they are not known.
    """
    wanted = app.machine_type
    if wanted is None:
        return None
    by_name = {each["metadata"]["name"]: each for each in machine_types}
    aliased = [raw for raw in machine_types if wanted in ((raw.get("spec") or {}).get("aliases") or ())]
    if wanted in by_name:
        found = by_name[wanted]
    elif len(aliased) == 1:
        found = aliased[0]
    elif aliased:
        names = " and ".join(sorted(each["metadata"]["name"] for each in aliased))
        return NoMachine(f"spec.machineType {wanted} is an alias of {names}; name one of them")
    else:
        known = sorted(
            {*by_name, *(alias for raw in machine_types for alias in (raw.get("spec") or {}).get("aliases") or ())}
        )
        hint = did_you_mean(wanted, known) or (f"; known are {', '.join(known)}" if known else "")
        cure = "" if known else "; there are no MachineTypes at all: create one, or remove spec.machineType"
        return NoMachine(f"spec.machineType {wanted}: no MachineType has this name or alias{hint}{cure}")
    name = found["metadata"]["name"]
    try:
        spec = MachineTypeSpec.model_validate(found.get("spec") or {}, by_name=False)
    except ValidationError as error:
        words = "; ".join(f"spec.{each}" for each in sentences(error, MachineTypeSpec))
        return NoMachine(f"MachineType {name} is not valid: {words}; correct it")
    if app.num_gpus > spec.gpus_per_node:
        return NoMachine(
            f"spec.numGPUs {app.num_gpus} is more than one {name} has ({spec.gpus_per_node}); "
            "a replica runs on one node: ask for fewer GPUs or for another machineType"
        )
    return Machine(name, spec, "" if nodes is None else _warning(name, spec, app, nodes))


def matching(spec: MachineTypeSpec, nodes: Sequence[NodeView]) -> list[NodeView]:
    """Return the nodes that carry the MachineType's labels and take pods."""
    return [
        node
        for node in nodes
        if node.ready and node.schedulable and spec.node_selector.items() <= dict(node.labels).items()
    ]


def _room(nodes: Sequence[NodeView], spec: MachineTypeSpec, resource: str) -> tuple[int, int]:
    """How many nodes fit, and the most GPUs that one of them offers; counted once for all apps while the nodes are the same."""
    kind = resource, *sorted(spec.node_selector.items())
    before = _counted.get(kind)
    if before is not None and before[0] is nodes:
        return before[1]
    fitting = matching(spec, nodes)
    found = len(fitting), max((gpus_of(node, resource) for node in fitting), default=0)
    if len(_counted) >= _MOST_COUNTED:
        _counted.clear()
    _counted[kind] = nodes, found
    return found


def gpus_of(node: NodeView, resource: str) -> int:
    """Return how many GPUs a node offers, used or not."""
    try:
        return int(quantity.parse(node.allocatable.get(resource, 0)))
    except ValueError:
        return 0


def _warning(name: str, spec: MachineTypeSpec, app: DistributedAppSpec, nodes: Sequence[NodeView]) -> str:
    resource = app.gpu.resource_name or spec.resource_name
    fitting, most = _room(nodes, spec, resource)
    selector = ",".join(f"{key}={value}" for key, value in sorted(spec.node_selector.items()))
    if not fitting:
        return f"{name} has 0 nodes" + (f" (label {selector})" if selector else "")
    if app.num_gpus == 0 or app.gpu.allocation != "DevicePlugin":
        return ""
    if most < app.num_gpus:
        return f"{name} has {fitting} nodes, none with {app.num_gpus} {resource} (at most {most})"
    return ""
