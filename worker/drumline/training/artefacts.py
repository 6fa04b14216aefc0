"""The end of a training: weights as a safetensors file, read from the last checkpoint by one rank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from drumline.toolkit import File
from drumline.training.state import MODEL


def exported(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Return the whole parameters of a checkpoint, on the CPU, by name.

    No collective: one rank (or a script without ranks) puts together what all ranks have written, however the model was
    split. It needs memory for all of them.

    Args:
        checkpoint: folder, e.g. ``checkpoints.path(step)``.
    """
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name.removeprefix(f"{MODEL}."): torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if name.startswith(f"{MODEL}.") and isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be
        load({MODEL: weights}, checkpoint_id=checkpoint, no_dist=True)
    return weights


def safetensors_file(weights: Mapping[str, torch.Tensor], name: str, metadata: Mapping[str, str] | None = None) -> File:
    """Return ``weights`` as a safetensors ``File`` in the repository that ``DRUMLINE_FILES`` names.

    Args:
        weights: by name; tensors of any device.
        name: file name, e.g. ``model.safetensors``.
        metadata: texts for the file's header; ``format: pt``, which transformers asks for, is there anyhow.
    """
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    data = save(plain, metadata={"format": "pt", **(metadata or {})})
    return File.from_bytes(data, content_type="application/safetensors", file_name=name)
