"""One way to use the GPUs, and what it costs. PURE."""

from __future__ import annotations

from dataclasses import dataclass

#: The share of a GPU's memory that a plan may fill: the rest is for CUDA's context, NCCL's buffers and fragmentation.
USABLE = 0.9
#: Bytes per second that a rank can send, by interconnect: what well-tuned collectives reach, not the label.
LINKS = {"nvlink": 350e9, "pcie": 25e9, "ethernet": 11e9}


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        gpus: ranks.
        memory: bytes of each GPU.
        link: key of ``LINKS``.
        operations: per second that a GPU reaches in practice, with 16-bit numbers.
        bandwidth: bytes per second of a GPU's own memory.
    """

    gpus: int
    memory: int
    link: str = "nvlink"
    operations: float = 400e12
    bandwidth: float = 3e12

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill on each GPU."""
        return self.memory * USABLE


@dataclass(frozen=True)
class Option:
    """One plan for one model on one machine. Bytes are per rank, the wire's are those that a rank sends in a step.

    Attributes:
        plan: its numbers, as in ``ParallelPlan``, or the name of a way to train.
        weights: parameters.
        state: gradients, optimizer state and buffers for them.
        cache: keys and values that are kept between steps.
        activations: the most that is alive in a step.
        wire: sent per step.
        compute: seconds of computing in a step.
        speed: results (images, tokens, samples) that all ranks together make in a step.
        exact: the result is that of one process, but for the order of sums.
    """

    plan: str
    weights: float
    state: float
    cache: float
    activations: float
    wire: float
    compute: float
    speed: float
    exact: bool = True

    @property
    def memory(self) -> float:
        """Bytes per rank."""
        return self.weights + self.state + self.cache + self.activations

    def fits(self, machine: Machine) -> bool:
        """Whether a rank's memory is enough."""
        return self.memory <= machine.usable

    def seconds(self, machine: Machine) -> float:
        """Estimate one step: computing, then sending, nothing at the same time. It is for comparing plans."""
        return self.compute + self.wire / LINKS[machine.link]

    def rate(self, machine: Machine) -> float:
        """Results per second of all ranks together."""
        return self.speed / self.seconds(machine)


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that each rank sends to sum ``size`` bytes, in a ring."""
    return 2 * size * (ranks - 1) / ranks


def gather(size: float, ranks: int) -> float:
    """Bytes that each rank sends to gather (or reduce and scatter) ``size`` bytes in all, in a ring."""
    return size * (ranks - 1) / ranks
