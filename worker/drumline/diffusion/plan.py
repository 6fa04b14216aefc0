"""How the ranks share one diffusion model: :class:`ParallelPlan`. PURE: no torch, no process group, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import prod
from typing import Literal

from drumline.errors import ConfigurationError, InvalidPayload

#: From the outermost to the innermost: neighbours in rank talk most, so what talks most is last.
DIMENSIONS = ("data", "cfg", "pipefusion", "ring", "ulysses", "tensor")


class PlanError(ConfigurationError, ValueError):
    """A plan does not fit the ranks or the model; the message names the number to change."""


@dataclass(frozen=True)
class ModelShape:
    """What a plan has to know about a denoiser. :func:`drumline.diffusion.describe` reads it from a model's configuration.

    Attributes:
        name: class of the denoiser.
        heads: attention heads of every block; None when they differ from block to block.
        blocks: transformer blocks, in the order in which they run.
        sequence: who splits the sequence: ``diffusers`` (the model has a plan for it and all its attention processors
            obey it), ``drumline`` (with our own processors), None (nobody can).
        bypassing: names of the attention processors that know nothing of a split sequence.
        tensor_widths: sizes of layers that tensor parallelism splits; empty when it cannot split this model.
        pipefusion: whether :class:`drumline.diffusion.FluxSampler` can run this model.
        guidance: how its pipelines run the two branches of classifier-free guidance: ``batched`` in one forward,
            ``separate`` forwards, None when that is not known.
        pixels_per_token: pixels along one side of an image token; 0 when the model has no image tokens.
    """

    name: str
    heads: int | None
    blocks: int
    sequence: Literal["diffusers", "drumline"] | None = None
    bypassing: tuple[str, ...] = ()
    tensor_widths: tuple[int, ...] = ()
    pipefusion: bool = False
    guidance: Literal["batched", "separate"] | None = None
    pixels_per_token: int = 0

    def image_tokens(self, width: int, height: int) -> int:
        """Return the tokens of an image of ``width`` x ``height`` pixels."""
        return (width // self.pixels_per_token) * (height // self.pixels_per_token)


@dataclass(frozen=True)
class ParallelPlan:
    """Over how many ranks each kind of parallelism goes; their product is the world size.

    Attributes:
        cfg: 2 when each rank runs one branch of classifier-free guidance, else 1.
        pipefusion: stages of a patch pipeline; each rank holds a part of the blocks.
        tensor: ranks that share every weight matrix.
        ulysses: ranks that split the sequence, and in attention the heads.
        ring: ranks that split the sequence, in attention too.
        data: independent images side by side.

    Raises:
        PlanError: a number is not positive, ``cfg`` is not 1 or 2, or two of them do not go together.
    """

    cfg: int = field(default=1, kw_only=True)
    pipefusion: int = field(default=1, kw_only=True)
    tensor: int = field(default=1, kw_only=True)
    ulysses: int = field(default=1, kw_only=True)
    ring: int = field(default=1, kw_only=True)
    data: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 1:
                raise PlanError(f"{each.name}={value!r} is not a number of ranks: use 1 or more")
        if self.cfg > 2:
            raise PlanError(
                f"cfg={self.cfg}: guidance has two branches, use cfg=1 or cfg=2 (and data= for more images)"
            )
        for one, other in (("tensor", "ulysses"), ("tensor", "ring"), ("tensor", "pipefusion"), ("ring", "pipefusion")):
            if getattr(self, one) > 1 and getattr(self, other) > 1:
                cure = " (or ulysses= in place of ring=)" if one == "ring" else ""
                raise PlanError(
                    f"{one}={getattr(self, one)} and {other}={getattr(self, other)} do not go together: "
                    f"set one of them to 1{cure}"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks along each of ``DIMENSIONS``."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world_size(self) -> int:
        """The ranks this plan needs."""
        return prod(self.sizes)

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        return " x ".join(f"{n}={s}" for n, s in zip(DIMENSIONS, self.sizes, strict=True) if s > 1) or "one rank"

    def place(self, rank: int) -> dict[str, int]:
        """Return where ``rank`` stands along each of ``DIMENSIONS``."""
        found = {}
        for name in reversed(DIMENSIONS):
            rank, found[name] = divmod(rank, getattr(self, name))
        return {name: found[name] for name in DIMENSIONS}

    def rank(self, place: dict[str, int]) -> int:
        """Return the rank at ``place``, the inverse of :meth:`place`."""
        rank = 0
        for name in DIMENSIONS:
            rank = rank * getattr(self, name) + place[name]
        return rank

    def peers(self, rank: int, *dimensions: str) -> list[int]:
        """Return the ranks that differ from ``rank`` along ``dimensions`` only, itself among them, in order."""
        mine = self.place(rank)
        others = [name for name in DIMENSIONS if name not in dimensions]
        every = range(self.world_size)
        return [peer for peer in every if all(self.place(peer)[name] == mine[name] for name in others)]

    def check(self, world_size: int, model: ModelShape) -> None:
        """Check the plan against the ranks and a model. Call it before weights are loaded.

        Raises:
            PlanError: it does not fit; the message names the number to change.
        """
        if self.world_size != world_size:
            raise PlanError(
                f"the plan ({self}) is for {self.world_size} ranks and there are {world_size}: start {self.world_size} "
                f"(-n {self.world_size}, or numGPUs in the manifest), or change a number of the plan"
            )
        self._check_guidance(model)
        self._check_pipefusion(model)
        self.check_sequence(model)
        self.check_tensor(model)

    def check_request(self, model: ModelShape, *, width: int, height: int, text_tokens: int, patches: int = 1) -> None:
        """Check that a request's tokens can be split. Call it first in ``__call__``, on all ranks.

        Args:
            model: as in :meth:`check`.
            width: pixels.
            height: pixels.
            text_tokens: of the prompt after padding, as the denoiser sees them.
            patches: of PipeFusion.

        Raises:
            InvalidPayload: they cannot; the message names the number to change.
        """
        if self.sequence == 1 and patches == 1:
            return
        for name, value in (("width", width), ("height", height)):
            if value % model.pixels_per_token:
                raise InvalidPayload(f"{name}={value} is not a multiple of {model.pixels_per_token} pixels")
        tokens = model.image_tokens(width, height)
        if tokens % self.sequence:
            raise InvalidPayload(
                f"{width}x{height} pixels are {tokens} image tokens, which {self._split} cannot share evenly: "
                f"use a width or height that is a multiple of {self.sequence * model.pixels_per_token}"
            )
        if text_tokens % self.sequence:
            raise InvalidPayload(
                f"{text_tokens} text tokens cannot be shared evenly by {self._split}: use "
                f"{text_tokens // self.sequence * self.sequence} or {-(-text_tokens // self.sequence) * self.sequence}"
            )
        if tokens // self.sequence < patches:
            raise InvalidPayload(
                f"{width}x{height} pixels are {tokens} image tokens, too few for {patches} patches of {self._split}: "
                f"use at most {tokens // self.sequence} patches, or a larger image"
            )

    @property
    def _split(self) -> str:
        return " x ".join(
            f"{name}={getattr(self, name)}" for name in ("ring", "ulysses") if getattr(self, name) > 1
        ) or ("one rank")

    def _check_guidance(self, model: ModelShape) -> None:
        if self.cfg == 2 and model.guidance != "batched" and not model.pipefusion:
            why = (
                "runs the two branches of guidance one after the other"
                if model.guidance
                else "is not known to batch them"
            )
            raise PlanError(f"cfg=2 needs both branches of guidance in one forward, and {model.name} {why}: use cfg=1")

    def _check_pipefusion(self, model: ModelShape) -> None:
        if self.pipefusion == 1:
            return
        if not model.pipefusion:
            raise PlanError(
                f"pipefusion={self.pipefusion}: there is no patch pipeline for {model.name}; use pipefusion=1"
            )
        if self.pipefusion > model.blocks:
            raise PlanError(
                f"pipefusion={self.pipefusion} stages need a block each, {model.name} has {model.blocks}: "
                f"use pipefusion={model.blocks} or less"
            )

    def check_sequence(self, model: ModelShape) -> None:
        """The part of :meth:`check` about ``ulysses`` and ``ring``."""
        if self.sequence == 1:
            return
        if model.sequence is None:
            reason = (
                f"its attention processors ({', '.join(model.bypassing)}) know nothing of a split sequence, "
                "and would return wrong images"
                if model.bypassing
                else "diffusers has no plan for it, and neither have we"
            )
            raise PlanError(
                f"{self._split}: the sequence of {model.name} cannot be split: {reason}; use ulysses=1 and ring=1"
            )
        if model.sequence == "drumline" and self.ring > 1:
            raise PlanError(f"ring={self.ring}: {model.name} is split by our own processors, which know ulysses= only")
        if self.ulysses > 1:
            self._check_heads("ulysses", self.ulysses, model)

    def check_tensor(self, model: ModelShape) -> None:
        """The part of :meth:`check` about ``tensor``."""
        if self.tensor == 1:
            return
        if not model.tensor_widths:
            raise PlanError(
                f"tensor={self.tensor}: diffusers has no tensor-parallel plan for {model.name}; use tensor=1"
            )
        self._check_heads("tensor", self.tensor, model)
        for width in model.tensor_widths:
            if width % self.tensor:
                raise PlanError(f"tensor={self.tensor} does not divide a layer of {model.name} that is {width} wide")

    @staticmethod
    def _check_heads(name: str, value: int, model: ModelShape) -> None:
        if model.heads is None:
            raise PlanError(f"{name}={value}: the attention heads of {model.name} are not known; use {name}=1")
        if model.heads % value:
            fitting = [str(n) for n in range(1, model.heads + 1) if model.heads % n == 0]
            raise PlanError(
                f"{name}={value} does not divide the {model.heads} attention heads of {model.name}: "
                f"use {', '.join(fitting[:-1])} or {fitting[-1]}"
            )
