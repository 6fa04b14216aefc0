"""The tiny models: the same everywhere, built once, loadable like downloaded ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from drumline.testing import tiny, tiny_flow


def test_a_build_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    first = tiny.build_taesd().state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = tiny.build_taesd().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny.build_taesd(seed=1).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_saved_models_load_and_are_small(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny.save_sdxl(tmp_path / "sdxl"))
    built = tiny.build_sdxl()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        loaded, fresh = getattr(pipeline, part).state_dict(), getattr(built, part).state_dict()
        assert loaded.keys() == fresh.keys()
        assert all(torch.equal(loaded[name], fresh[name]) for name in fresh), part
    ids = pipeline.tokenizer("a cat").input_ids
    assert ids[0] == 512
    assert ids[-1] == 513
    assert len(ids) == 6
    vae = AutoencoderTiny.from_pretrained(tiny.save_taesd(tmp_path / "taesd"))
    assert vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 10e6


def test_decoders_show_colours_that_are_neither_flat_nor_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = torch.randn(2, 4, 16, 16, generator=generator)
        for image in (tiny.build_sdxl().vae.decode(latents * 5).sample, tiny.build_taesd().decode(latents).sample):
            assert 0.05 < image.std() < 1.0
            assert (image.abs() > 1).float().mean() < 0.2


def test_the_cache_is_filled_once_and_whole_whoever_asks_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: tiny.tiny_models(), range(3)))
    (folder,) = folders
    assert folder.parent == tmp_path / "drumline" / "models"
    assert sorted(path.name for path in folder.iterdir()) == ["sdxl", "taesd"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no scratch folder is left"

    def never(*_: Any) -> Path:
        raise AssertionError("built again")

    monkeypatch.setattr(tiny, "save_sdxl", never)
    monkeypatch.setattr(tiny, "save_taesd", never)
    assert tiny.tiny_models() == folder


def test_a_new_recipe_does_not_find_old_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_build_into", lambda folder, _: folder.mkdir())
    old = tiny.tiny_models(tmp_path)
    monkeypatch.setattr(tiny, "RECIPE", tiny.RECIPE + 1)
    assert tiny.tiny_models(tmp_path) != old


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(tiny, "save_sdxl", broken)
    with pytest.raises(OSError, match="disk full"):
        tiny.tiny_models(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_save_says_so(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with pytest.raises(RuntimeError, match="rank 0 only"):
            tiny.tiny_models(tmp_path)
    finally:
        dist.destroy_process_group()
    assert list(tmp_path.iterdir()) == []


def test_flow_models_load_are_small_and_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderTiny, FluxPipeline, StableDiffusion3Pipeline

    folder = tiny_flow.tiny_flow_models(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["flux", "sd3", "taef1"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10e6
    for kind, cls, build in (
        ("flux", FluxPipeline, tiny_flow.build_flux),
        ("sd3", StableDiffusion3Pipeline, tiny_flow.build_sd3),
    ):
        loaded, fresh = cls.from_pretrained(folder / kind).transformer.state_dict(), build().transformer.state_dict()
        assert loaded.keys() == fresh.keys()
        assert all(torch.equal(loaded[name], fresh[name]) for name in fresh), kind
    assert AutoencoderTiny.from_pretrained(folder / "taef1").config.scaling_factor == 0.5
    monkeypatch.setattr(tiny_flow, "save_pipeline", None)
    assert tiny_flow.tiny_flow_models(tmp_path) == folder
    monkeypatch.setattr(tiny_flow, "RECIPE", tiny_flow.RECIPE + 1)
    with pytest.raises(TypeError):
        tiny_flow.tiny_flow_models(tmp_path)
