"""What `drumline plan` computes, against real model classes: parameters and activations."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drumline.planning.diffusion import Denoiser
from drumline.planning.known import KNOWN
from drumline.planning.language import LanguageModel

LANGUAGE = [model for model in KNOWN.values() if isinstance(model, LanguageModel)]
DENOISERS = [model for model in KNOWN.values() if isinstance(model, Denoiser)]


def named(models: list[Any]) -> Any:
    return pytest.mark.parametrize("facts", models, ids=lambda facts: facts.name.split("/")[1])


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def language_class(facts: LanguageModel, **changes: Any) -> Any:
    import transformers

    kind = "Qwen3" if facts.normed else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=facts.vocabulary,
        hidden_size=facts.hidden,
        intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        tie_word_embeddings=facts.tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def denoiser(facts: Denoiser) -> Any:
    import diffusers

    if facts.kind == "flux":
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=facts.channels,
            num_layers=facts.double,
            num_single_layers=facts.single,
            attention_head_dim=facts.head_dim,
            num_attention_heads=facts.heads,
            joint_attention_dim=facts.text_width,
            pooled_projection_dim=facts.pooled_width,
            guidance_embeds=facts.distilled,
            axes_dims_rope=(16, 56, 56),
        )
    if facts.kind == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=facts.double,
            attention_head_dim=facts.head_dim,
            num_attention_heads=facts.heads,
            joint_attention_dim=facts.text_width,
            caption_projection_dim=facts.hidden,
            pooled_projection_dim=facts.pooled_width,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        transformer_layers_per_block=[1, 2, 10],
        projection_class_embeddings_input_dim=2816,
        cross_attention_dim=2048,
    )


# -- parameters: the real sizes, on the meta device, which needs no memory


@named(LANGUAGE)
def test_parameters_of_named_language_models(facts: LanguageModel) -> None:
    with torch.device("meta"):
        model = language_class(facts)
    assert count(model) == facts.parameters
    assert count(model.model.layers[0]) == facts.layer
    plan = {name.rsplit(".", 1)[1] for name, style in model.config.base_model_tp_plan.items() if style != "replicated"}
    split = sum(count(m) for name, m in model.model.layers[0].named_modules() if name.rsplit(".", 1)[-1] in plan)
    norms = 2 * facts.head_dim if facts.normed else 0  # in the plan for their gradients, not split
    assert split - norms == facts.split_per_layer


@named(DENOISERS)
def test_parameters_of_named_denoisers(facts: Denoiser) -> None:
    with torch.device("meta"):
        model = denoiser(facts)
    assert count(model) == facts.parameters
    if facts.kind != "unet":
        blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
        assert sum(map(count, blocks)) == facts.blocks


def test_parameters_of_text_encoders_and_vae() -> None:
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    from drumline.planning import known

    big = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    t5 = T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        assert count(CLIPTextModel(small)) == known._CLIP_L
        assert count(CLIPTextModelWithProjection(big)) == known._CLIP_G
        assert count(T5EncoderModel(t5)) == known._T5_XXL
        vae = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        assert count(vae) == known._VAE


# -- activations


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": 4}, {"hidden": 96}, {"intermediate": 320}, {"kv_heads": 2}, {"heads": 8, "kv_heads": 8}],
    ids=str,
)
def test_numbers_that_a_training_step_keeps(changes: dict[str, int], normed: bool) -> None:
    sizes = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 4, "head_dim": 16, **changes}
    facts = LanguageModel("tiny", vocabulary=50, normed=normed, **sizes)
    batch, length = 2, 32
    model = language_class(facts).train()
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False).logits
    assert logits.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values()) / 4 / (batch * length)
    expected = facts.layers * facts.saved_per_token() + 3 * facts.hidden
    # Beside the layers: the ids, the last norm's scale, and sines and cosines that all layers and texts share.
    assert measured - expected == pytest.approx(3 + 2 * facts.head_dim / batch, abs=1e-6)


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what a model computes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if size and key not in self.alive and key not in self.own:
                    self.alive.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, key, size)
        return out

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@named(DENOISERS)
def test_the_most_activations_alive_in_a_forward_pass(facts: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scores(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(query)  # like a fused kernel; on the meta device torch would make all scores

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_scores)
    images, side = 2 if facts.batched else 1, 64
    with torch.device("meta"), torch.inference_mode():
        model = denoiser(facts).bfloat16().eval()
        peak = Peak(model)
        if facts.kind == "flux":
            tokens = side * side
            inputs = {
                "hidden_states": torch.zeros(images, tokens, facts.channels).bfloat16(),
                "encoder_hidden_states": torch.zeros(images, facts.text, facts.text_width).bfloat16(),
                "pooled_projections": torch.zeros(images, facts.pooled_width).bfloat16(),
                "timestep": torch.zeros(images).bfloat16(),
                "guidance": torch.zeros(images) if facts.distilled else None,
                "img_ids": torch.zeros(tokens, 3),
                "txt_ids": torch.zeros(facts.text, 3),
            }
        elif facts.kind == "sd3":
            inputs = {
                "hidden_states": torch.zeros(images, 16, 2 * side, 2 * side).bfloat16(),
                "encoder_hidden_states": torch.zeros(images, facts.text, facts.text_width).bfloat16(),
                "pooled_projections": torch.zeros(images, facts.pooled_width).bfloat16(),
                "timestep": torch.zeros(images),
            }
        else:
            inputs = {
                "sample": torch.zeros(images, 4, 2 * side, 2 * side).bfloat16(),
                "timestep": torch.zeros(()),
                "encoder_hidden_states": torch.zeros(images, facts.text, facts.text_width).bfloat16(),
                "added_cond_kwargs": {
                    "text_embeds": torch.zeros(images, 1280).bfloat16(),
                    "time_ids": torch.zeros(images, 6).bfloat16(),
                },
            }
        with peak:
            model(**inputs)
    tokens = facts.image_tokens(1024, 1024) + (facts.text if facts.kind != "unet" else 0)
    planned = facts.peak_numbers(tokens) * images * 2
    assert 0.8 * planned <= peak.most <= planned
