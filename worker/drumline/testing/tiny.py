"""Tiny diffusion models built offline from configurations: what tests, examples and the demo run in place of real ones.

The weights are random but fixed by a seed, so two machines with the same library versions hold the same model. A random
decoder would show noise; here its kernels are smoothing ones, so an image is a soft field of colours that depends on
the noise it started from (and a little on the prompt): good enough to see whether two ranks drew different images.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

#: Raise it when a builder below changes: cached models of older recipes are then left alone and new ones are built.
RECIPE = 2

_CLIP_END = 513  # last id of the byte vocabulary below, also used as padding
_LATENT_CHANNELS = 4
_building = threading.Lock()  # torch's seed is the whole process's


def build_sdxl(seed: int = 0) -> Any:
    """Return a tiny ``StableDiffusionXLPipeline`` in float32 on the CPU (about 1 M parameters, VAE scale 8).

    Args:
        seed: of the weights; the caller's random state is left as it was.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with seeded(seed):
        return StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=clip_text(projection=False),
            text_encoder_2=clip_text(projection=True),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=_unet(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            add_watermarker=False,
        )


def build_taesd(seed: int = 0, scaling_factor: float = 25.0) -> Any:
    """Return a tiny ``AutoencoderTiny`` in float32 on the CPU: the fast decoder of previews.

    Args:
        seed: of the weights; the caller's random state is left as it was.
        scaling_factor: what latents are divided by before they are decoded.
    """
    from diffusers import AutoencoderTiny

    with seeded(seed):
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(32,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
            scaling_factor=scaling_factor,
        ).eval()
        decoder = vae.decoder
        _smooth(decoder, through=0.8)
        # Its last layer's range is 0..1; what comes in is squeezed by a tanh at 3, hence the scaling_factor.
        _colour(vae, decoder.layers[-1], middle=0.5, contrast=0.2)
    return vae


def save_sdxl(folder: Path | str, seed: int = 0) -> Path:
    """Write :func:`build_sdxl` to ``folder`` (made if needed, 5 MB) for ``from_pretrained``; return it.

    Raises:
        RuntimeError: this process is a rank other than 0, where transformers leaves out the weights.
    """
    return save_pipeline(build_sdxl(seed), folder)


def save_pipeline(pipeline: Any, folder: Path | str) -> Path:
    """Write ``pipeline`` to ``folder`` (made if needed) for ``from_pretrained``; return it.

    Raises:
        RuntimeError: this process is a rank other than 0, where transformers leaves out the weights.
    """
    with without_progress_bars():
        pipeline.save_pretrained(folder)
    if not any(Path(folder, "text_encoder").glob("*.safetensors")):
        raise RuntimeError("transformers saves models on rank 0 only; build the tiny models there, then pass a barrier")
    return Path(folder)


def save_taesd(folder: Path | str, seed: int = 0, scaling_factor: float = 25.0) -> Path:
    """Write :func:`build_taesd` to ``folder`` (made if needed, 0.6 MB) for ``from_pretrained``; return it."""
    build_taesd(seed, scaling_factor).save_pretrained(folder)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    config.pop("block_out_channels", None)  # written by diffusers, which then warns about it at every load
    file.write_text(json.dumps(config, indent=2) + "\n")
    return Path(folder)


def tiny_models(cache: Path | None = None) -> Path:
    """Return a folder that holds ``sdxl`` and ``taesd``, built at the first call and found again by later ones.

    Args:
        cache: parent folder; by default ``$XDG_CACHE_HOME/drumline/models`` (``~/.cache/drumline/models``).

    The folder's name depends on the recipe and on the versions of torch, diffusers and transformers. It appears in one
    step (a rename), so any number of processes and threads may call this at once.
    """
    return built_once({"sdxl": save_sdxl, "taesd": save_taesd}, RECIPE, cache)


def built_once(savers: dict[str, Callable[[Path], Path]], recipe: int, cache: Path | None = None) -> Path:
    """Return the folder that holds a subfolder for each of ``savers``, which are called when it is not there yet.

    Args:
        savers: by name of the subfolder; each writes a model to the path it is given.
        recipe: of the builders behind ``savers``; raise it when one changes.
        cache: parent folder; by default ``$XDG_CACHE_HOME/drumline/models`` (``~/.cache/drumline/models``).
    """
    versions = [f"{name}={version(name)}" for name in ("torch", "diffusers", "transformers")]
    key = hashlib.sha256("\n".join([*savers, f"recipe={recipe}", *versions]).encode()).hexdigest()[:16]
    cache = cache or _default_cache()
    folder = cache / key
    with _building:
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        _build_into(folder, savers)
    return folder


def on_every_rank(build: Callable[[], Path], rank: int) -> Path:
    """Return what ``build`` returns, on all ranks: rank 0 calls it first, then the others.

    transformers saves models on rank 0 only, so no other rank may be the one that builds.
    """
    import torch.distributed as dist

    if rank == 0:
        build()
    dist.barrier()
    return build()


def _build_into(folder: Path, savers: dict[str, Callable[[Path], Path]]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, save in savers.items():
            save(scratch / name)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else: somebody else was faster, theirs is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "drumline" / "models"


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off in the body."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix torch's seed in the body; the caller's random state is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def clip_tokenizer() -> Any:
    """Return a byte-level CLIP tokenizer without merges: 256 bytes, 256 end-of-word bytes and 2 specials, 514 ids."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]  # shown as code points from 256 on, as in GPT-2
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(moved))]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_text(*, projection: bool) -> Any:
    """Return a CLIP text encoder of width 32 for :func:`clip_tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        vocab_size=_CLIP_END + 1,
        bos_token_id=_CLIP_END - 1,
        eos_token_id=_CLIP_END,
        pad_token_id=_CLIP_END,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _unet() -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=32 + 6 * 8,  # pooled text + six sizes of 8
        cross_attention_dim=32 + 32,  # both text encoders
    ).eval()
    _smooth(unet)
    text = {"text_embeds": torch.randn(4, 32), "time_ids": torch.full((4, 6), 256.0)}
    _calibrate(
        unet.conv_out,
        lambda: unet(_blobs(), 500, torch.randn(4, 77, 64), added_cond_kwargs=text, return_dict=False)[0],
        std=3.0,  # more than the noise it starts from, so that a picture appears in it
    )
    return unet


def autoencoder(**config: Any) -> Any:
    """Return an ``AutoencoderKL`` of scale 8 with 4 latent channels; ``config`` adds to its configuration."""
    from diffusers import AutoencoderKL

    blocks = 4  # scale 8
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=_LATENT_CHANNELS,
        block_out_channels=(16,) * blocks,
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        sample_size=128,
        **{"scaling_factor": 0.13, **config},
    ).eval()
    _smooth(vae.decoder, through=0.8)
    _colour(vae, vae.decoder.conv_out, middle=0.0, contrast=0.4)
    return vae


def _blobs() -> torch.Tensor:
    import torch

    return torch.nn.functional.interpolate(torch.randn(4, _LATENT_CHANNELS, 8, 8), size=(32, 32), mode="bicubic")


def _smooth(module: torch.nn.Module, *, through: float = 0.0) -> None:
    """Give every 3x3 convolution a low-pass kernel, weighted with its random centre.

    Args:
        module: what holds the convolutions.
        through: how much of each channel goes straight through layers with as many channels in as out.
    """
    import torch

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3):
                mix = part.weight[:, :, 1, 1] * 3
                if through and part.in_channels == part.out_channels:
                    mix = through * torch.eye(part.in_channels) + (1 - through) * mix
                part.weight.copy_(mix[:, :, None, None] * _kernel())


def _calibrate(last: torch.nn.Conv2d, run: Callable[[], torch.Tensor], *, std: float) -> None:
    """Scale the last layer so that what ``run`` returns (N, C, H, W) has mean 0 and this ``std`` in each channel."""
    import torch

    assert last.bias is not None
    with torch.no_grad():
        output = run()
        scale = std / output.std(dim=(0, 2, 3))
        last.bias.copy_((last.bias - output.mean(dim=(0, 2, 3))) * scale)
        last.weight.mul_(scale[:, None, None, None])


def _colour(vae: Any, last: torch.nn.Conv2d, *, middle: float, contrast: float) -> None:
    """Fit the last layer, so that both decoders show much the same colours for the same latents, whatever their scale.

    Args:
        vae: decodes latents (N, 4, H, W).
        last: its decoder's last convolution.
        middle: output for grey.
        contrast: standard deviation of the output.
    """
    import torch

    inputs: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        latents = _blobs()
        vae.decode(latents * 2)
        features = torch.nn.functional.avg_pool2d(inputs[0], 3, 1, 1)
        mix = torch.tensor([[1.0, -0.4, 0.2], [-0.3, 0.9, 0.5], [0.4, 0.3, -1.0], [-0.5, -0.5, 0.6]])
        wanted = torch.einsum("nchw,cd->ndhw", latents / latents.std(), mix) * contrast + middle
        wanted = torch.nn.functional.interpolate(wanted, size=features.shape[2:], mode="bilinear")
        table = features.permute(0, 2, 3, 1).flatten(0, 2)
        table = torch.cat([table, torch.ones(len(table), 1)], dim=1)
        found = torch.linalg.lstsq(table, wanted.permute(0, 2, 3, 1).flatten(0, 2)).solution
        last.weight.copy_(found[:-1].T[:, :, None, None] * _kernel())
        assert last.bias is not None
        last.bias.copy_(found[-1])
    hook.remove()


def _kernel() -> torch.Tensor:
    import torch

    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    return torch.outer(line, line)
