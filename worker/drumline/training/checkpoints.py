"""Checkpoints that are whole or absent: written to a temporary name by all ranks, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from drumline.errors import InvalidPayload
from drumline.training import state

_NAME = re.compile(r"step-(\d{8})")
_FACTS = "run.json"


class Checkpoints:
    """The checkpoints of one run, in one folder that all ranks see.

    All methods are collectives: every rank calls them at the same step. Layers are saved under their own names, so
    FSDP, ZeRO-1, tensor and pipeline parallel runs may go on with another number of ranks.

    torch reads a checkpoint's index with ``pickle``: whoever may write to the folder may run code in the ranks.

    Args:
        folder: of this run; made when needed.
        device: the worker's.
        run: what must be the same for a resumed run to go on as the first one would have: seed, batch, rates, model.
        keep: the latest so many are kept.
    """

    def __init__(
        self, folder: str | Path, device: torch.device, *, run: Mapping[str, Any] | None = None, keep: int = 2
    ) -> None:
        self.folder = Path(folder)
        self._device = device
        self._run = dict(run or {})
        self._keep = max(1, keep)
        self._lead = dist.get_rank() == 0

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is or will be."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int:
        """Return the step of the newest whole checkpoint, 0 when there is none; the same on all ranks."""
        found = 0
        if self._lead and self.folder.is_dir():
            found = max(self._steps(), default=0)
        answer = torch.tensor(found, device=self._device)
        dist.broadcast(answer, src=0)  # rank 0's word counts: a shared folder need not look the same everywhere
        return int(answer.item())

    def resume(self, parts: Sequence[state.Part]) -> int:
        """Load the newest checkpoint into ``parts`` and return its step; 0, with ``parts`` untouched, when there is none.

        What a killed run left half written is removed.

        Raises:
            InvalidPayload: the checkpoint belongs to another run: the message names what differs.
        """
        step = self.latest()
        if self._lead:
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        if not step:
            return 0
        self._compare(step)
        held = state.collect(parts)
        load(held, checkpoint_id=self.path(step))
        state.restore(parts, held)
        return step

    def save(self, step: int, parts: Sequence[state.Part]) -> None:
        """Write the checkpoint of ``step`` (steps done so far). A kill at any moment leaves the older ones usable."""
        target, scratch = self.path(step), self.folder / f".step-{step:08d}"
        if self._lead:
            shutil.rmtree(scratch, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        save(state.collect(parts), checkpoint_id=scratch)
        if self._lead:
            _write(scratch / _FACTS, json.dumps(self._run, sort_keys=True, default=str))
            if target.exists():  # of the same run and step, so it holds the same
                shutil.rmtree(scratch)
            else:
                scratch.rename(target)
                _sync(self.folder)
            for old in sorted(self._steps())[: -self._keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        dist.barrier()

    def _steps(self) -> list[int]:
        return [int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name))]

    def _compare(self, step: int) -> None:
        theirs = json.loads((self.path(step) / _FACTS).read_text())
        ours = json.loads(json.dumps(self._run, default=str))
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise InvalidPayload(
                    f"{name}: the run in {self.folder.name} has {theirs.get(name)!r} at step {step}, this request "
                    f"{ours.get(name)!r}; use the same value, or another name for the run"
                )


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` last."""
    with contextlib.suppress(OSError):  # some network file systems know no fsync of folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
