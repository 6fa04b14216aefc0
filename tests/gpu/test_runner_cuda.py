"""Ranks on a GPU: NCCL with one rank per device, gloo for several on one, restarts, results, the fork server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from drumline.distributed import DistributedRunner
from drumline.errors import RankLost, SetupFailed
from drumline.runner.runner import RestartPolicy
from drumline.testing.workers import Facts, Steps

CUDA_AT_IMPORT = """
import torch
from drumline.distributed import DistributedWorker
torch.zeros(1, device="cuda")

class Early(DistributedWorker):
    def __call__(self, streaming: bool = False) -> dict:
        return {"device": str(self.device), "sum": float(torch.ones(3, device=self.device).sum())}
"""

ON_DEVICE = """
import torch
from drumline.distributed import DistributedWorker

class OnDevice(DistributedWorker):
    def __call__(self, streaming: bool = False, size: int = 3) -> dict:
        return {"tensor": torch.arange(size, device=self.device), "current": torch.cuda.current_device()}
"""


async def test_one_rank_per_gpu_uses_nccl() -> None:
    world_size = torch.cuda.device_count()
    async with DistributedRunner(Facts, world_size=world_size) as runner:
        ranks = (await runner.invoke())["ranks"]
        assert [rank["device"] for rank in ranks] == [f"cuda:{n}" for n in range(world_size)]
        assert {rank["backend"] for rank in ranks} == {"nccl"}


async def test_ranks_share_a_gpu_with_gloo() -> None:
    async with DistributedRunner(Facts, world_size=2, device="cuda", backend="gloo") as runner:
        ranks = (await runner.invoke())["ranks"]
        assert all(rank["device"].startswith("cuda:") for rank in ranks)
        assert {rank["backend"] for rank in ranks} == {"gloo"}


async def test_too_few_gpus_are_named() -> None:
    world_size = torch.cuda.device_count() + 1
    with pytest.raises(SetupFailed, match=rf"{world_size} ranks need {world_size} GPUs"):
        await DistributedRunner(Facts, world_size=world_size, device="cuda", backend="nccl").start()


async def test_a_killed_rank_gives_its_gpu_back_to_the_next() -> None:
    restart = RestartPolicy(max_restarts=20, backoff_seconds=0)
    async with DistributedRunner(Steps, world_size=1, device="cuda", restart=restart) as runner:
        for _ in range(5):
            ticket = runner.submit({"steps": 10_000, "seconds": 0.01, "collective": False}, streaming=True)
            await ticket.next(30)
            pid = runner.status.ranks[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(RankLost, match="rank 0"):
                await ticket.result()
            assert (await runner.invoke({"steps": 1, "collective": False}))["total"] == 1.0


async def test_results_leave_the_gpu(tmp_path: Path) -> None:
    file = tmp_path / "on_device.py"
    file.write_text(ON_DEVICE)
    async with DistributedRunner(f"{file}:OnDevice", world_size=1, device="cuda") as runner:
        for size in (3, 4 << 20):
            result = await runner.invoke({"size": size})
            assert result["tensor"].device.type == "cpu"
            assert torch.equal(result["tensor"], torch.arange(size))
            assert result["current"] == 0


async def test_a_module_that_initialises_cuda_is_spawned(tmp_path: Path) -> None:
    file = tmp_path / "early.py"
    file.write_text(CUDA_AT_IMPORT)
    async with DistributedRunner(f"{file}:Early", world_size=1, device="cuda") as runner:
        assert (await runner.invoke())["sum"] == 3.0
