"""Models whose sequence we split ourselves, where diffusers cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

from drumline.diffusion.attention import FluxUlysses, JointUlysses, Ulysses


@dataclass(frozen=True)
class OwnPlan:
    """How we split a model's sequence ourselves, where diffusers cannot.

    Attributes:
        processor: for all its attention layers.
        gather: module whose output is put together again, along dimension 1.
        inputs: arguments of the model's forward that are split, with the dimension.
        outputs: modules whose output is split, with the dimension.
    """

    processor: type[Ulysses]
    gather: str
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)


OWN_PLANS = {
    "FluxTransformer2DModel": OwnPlan(
        FluxUlysses, "proj_out", inputs={"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0}
    ),
    "SD3Transformer2DModel": OwnPlan(JointUlysses, "proj_out", outputs={"pos_embed": 1, "context_embedder": 1}),
}
