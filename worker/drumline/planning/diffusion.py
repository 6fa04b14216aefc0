"""Denoisers: parameters, activations, operations of one step, from the sizes of their blocks. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from drumline.diffusion.patches import stage_blocks
from drumline.diffusion.plan import ModelShape
from drumline.errors import ConfigurationError

#: The most numbers alive at once in a forward pass, per token and channel; measured on the models themselves with
#: attention that keeps no scores (tests/strategies/test_plan_measured.py).
_PEAK = {"flux": 18.0, "sd3": 13.0}


@dataclass(frozen=True)
class Denoiser:
    """A diffusion transformer, or a UNet whose numbers are given.

    Attributes:
        name: for people.
        kind: which formulas hold.
        heads: per block; None for a UNet.
        head_dim: of each head.
        double: blocks with weights for image and text each.
        single: blocks with one set of weights for both.
        text: tokens of a padded prompt.
        text_width: of the text encoder's output.
        pooled_width: of the pooled text.
        channels: of the latent in a token.
        batched: guidance runs as one batch of two.
        companions: parameters of text encoders and VAE, which every rank holds whole.
        distilled: takes the guidance scale as an input.
        given: parameters, for a UNet.
        positions: learned or fixed positions that are stored, in numbers.
        peak: numbers alive at once for each latent, for a UNet.
        work: operations of a forward pass for each latent, for a UNet.
    """

    name: str
    kind: Literal["flux", "sd3", "unet"]
    heads: int | None
    head_dim: int
    double: int
    single: int
    text: int
    text_width: int
    pooled_width: int
    channels: int
    batched: bool
    companions: int
    distilled: bool = False
    given: int = 0
    positions: int = 0
    peak: float = 0.0
    work: float = 0.0

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return (self.heads or 0) * self.head_dim

    @property
    def shape(self) -> ModelShape:
        """What ``ParallelPlan`` has to know."""
        names = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel", "unet": "UNet2DConditionModel"}
        sequences: dict[str, Literal["diffusers", "drumline"] | None] = {
            "flux": "diffusers",
            "sd3": "drumline",
            "unet": None,
        }
        return ModelShape(
            name=names[self.kind],
            heads=self.heads,
            blocks=self.double + self.single,
            sequence=sequences[self.kind],
            tensor_widths=(self.hidden, 4 * self.hidden) if self.kind == "flux" else (),
            pipefusion=self.kind == "flux",
            guidance="batched" if self.batched else "separate",
            pixels_per_token=16 if self.kind != "unet" else 0,
        )

    @property
    def split(self) -> int:
        """Parameters in matrices of the blocks, which tensor parallelism splits, their column biases included."""
        h = self.hidden
        if self.kind == "unet":
            return 0
        double = 2 * (3 * (h * h + h) + h * h + (4 * h * h + 4 * h) + 4 * h * h)
        single = 3 * (h * h + h) + (4 * h * h + 4 * h) + 5 * h * h
        return self.double * double + self.single * single

    @property
    def _each(self) -> tuple[int, int]:
        """Parameters of a double and of a single block."""
        h, d = self.hidden, self.head_dim
        norm = 6 * h * h + 6 * h
        double = 2 * (norm + 4 * (h * h + h) + 8 * h * h + 5 * h) + 4 * d
        single = 3 * h * h + 3 * h + 3 * (h * h + h) + 4 * h * h + 4 * h + 5 * h * h + h + 2 * d
        return double, single

    @property
    def blocks(self) -> int:
        """Parameters of all blocks, which pipeline stages share."""
        h = self.hidden
        if self.kind == "unet":
            return 0
        double, single = self._each
        if self.kind == "sd3":  # the last block drops its text: no feed-forward, no output, two scales in place of six
            return self.double * double - (4 * h * h + 4 * h) - (8 * h * h + 5 * h) - (h * h + h)
        return self.double * double + self.single * single

    def largest_stage(self, stages: int) -> tuple[int, int]:
        """Return the parameters and the number of the blocks in the largest of some pipeline stages.

        The stages have equally many blocks, since a token takes as long in each; those with double blocks, which come
        first, hold more parameters.
        """
        if stages == 1:
            return self.blocks, self.double + self.single
        double, single = self._each
        sizes = [double] * self.double + [single] * self.single
        cuts = [stage_blocks(len(sizes), stages, stage) for stage in range(stages)]
        return max(sum(sizes[cut.start : cut.stop]) for cut in cuts), max(map(len, cuts))

    @property
    def parameters(self) -> int:
        """Of the denoiser."""
        if self.given:
            return self.given
        h = self.hidden
        embedders = (256 * h + h + h * h + h) * (2 if self.distilled else 1)
        pooled = self.pooled_width * h + h + h * h + h
        inputs = self.channels * h + h + self.text_width * h + h
        outputs = 2 * h * h + 2 * h + h * self.channels + self.channels
        return self.blocks + embedders + pooled + inputs + outputs

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens of an image; latents for a UNet."""
        side = 16 if self.kind != "unet" else 8
        return (width // side) * (height // side)

    def peak_numbers(self, tokens: float) -> float:
        """The most activations alive at once in a forward pass of ``tokens`` tokens (latents for a UNet)."""
        return tokens * (self.peak if self.kind == "unet" else _PEAK[self.kind] * self.hidden)

    def operations(self, tokens: int) -> float:
        """Multiplications and additions of one forward pass over ``tokens`` tokens (latents for a UNet) of one image."""
        if self.kind == "unet":
            return self.work * tokens
        h = self.hidden
        # A token passes its own half of a double block.
        per_token = self.double * 12 * h * h + self.single * 12 * h * h
        attention = (self.double + self.single) * 2 * tokens * h
        return 2.0 * tokens * (per_token + attention)


def of_config(config: Mapping[str, Any], name: str = "") -> Denoiser:
    """Read the ``config.json`` of a diffusers transformer. Text encoders are those of the published models.

    Raises:
        ConfigurationError: not a class that is planned for.
    """
    kind = config.get("_class_name")
    if kind == "FluxTransformer2DModel":
        return Denoiser(
            name=name or "flux",
            kind="flux",
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            double=config["num_layers"],
            single=config["num_single_layers"],
            text=512,
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            channels=config["in_channels"],
            batched=False,
            companions=0,
            distilled=config.get("guidance_embeds", False),
        )
    raise ConfigurationError(f"_class_name: {kind!r} is not planned for; known are FluxTransformer2DModel")
