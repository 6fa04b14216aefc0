"""Facts of named models, so that they can be planned without a download. Counted again in the tests, on empty models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drumline.errors import ConfigurationError
from drumline.planning.diffusion import Denoiser, of_config
from drumline.planning.language import FAMILY, LanguageModel

_T5_XXL, _CLIP_L, _CLIP_G = 4_762_310_656, 123_060_480, 694_659_840
_VAE = 83_819_683

_LANGUAGE = [
    LanguageModel("HuggingFaceTB/SmolLM2-1.7B", 24, 2048, 8192, 32, 32, 64, 49152, tied=True),
    LanguageModel("Qwen/Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, normed=True),
    LanguageModel("Qwen/Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936, normed=True),
    LanguageModel("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    LanguageModel("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
]
_DIFFUSION = [
    Denoiser(
        "black-forest-labs/FLUX.1-dev", "flux", 24, 128, 19, 38, 512, 4096, 768, 64,
        batched=False, companions=_T5_XXL + _CLIP_L + _VAE, distilled=True,
    ),
    Denoiser(
        "black-forest-labs/FLUX.1-schnell", "flux", 24, 128, 19, 38, 256, 4096, 768, 64,
        batched=False, companions=_T5_XXL + _CLIP_L + _VAE,
    ),
    Denoiser(
        "stabilityai/stable-diffusion-3.5-large", "sd3", 38, 64, 38, 0, 333, 4096, 2048, 64,
        batched=True, companions=_T5_XXL + _CLIP_L + _CLIP_G + _VAE,
    ),
    Denoiser(
        "stabilityai/stable-diffusion-xl-base-1.0", "unet", None, 0, 0, 0, 77, 2048, 1280, 4,
        batched=True, companions=_CLIP_L + _CLIP_G + _VAE, given=2_567_463_684, peak=5100.0, work=4.1e8,
    ),
]  # fmt: skip
_MODELS: list[LanguageModel | Denoiser] = [*_LANGUAGE, *_DIFFUSION]
KNOWN = {model.name: model for model in _MODELS}


def find(model: str) -> LanguageModel | Denoiser:
    """Return the facts of a model.

    Args:
        model: a name (the part after the slash will do), a folder with a ``config.json`` (or ``transformer/config.json``),
            or such a file.

    Raises:
        ConfigurationError: neither; the message lists the names.
    """
    for name, facts in KNOWN.items():
        if model.lower() in (name.lower(), name.lower().split("/")[1]):
            return facts
    path = Path(model)
    for file in (path, path / "transformer" / "config.json", path / "config.json"):
        if file.is_file():
            return _of_file(file, path.name)
    raise ConfigurationError(f"MODEL: {model!r} is no folder and none of {', '.join(KNOWN)}; give a config.json")


def _of_file(file: Path, name: str) -> LanguageModel | Denoiser:
    try:
        config: Any = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file}: a JSON object is needed")
    if config.get("model_type") in FAMILY:
        return LanguageModel.of_config(config, name)
    try:
        return of_config(config, name)
    except KeyError as error:
        raise ConfigurationError(f"{file}: {error.args[0]} is missing") from None
