"""Tensors on a GPU reach the wire: copied to the host, same bits."""

from __future__ import annotations

import pytest
import torch

from drumline.codec import pack, snapshot, to_json, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
@pytest.mark.parametrize("large", [False, True])
def test_tensors_of_a_gpu(dtype: torch.dtype, large: bool) -> None:
    count = 300_000 if large else 30
    tensor = (torch.rand(count, device="cuda") * 3).to(dtype).view(3, -1)
    for value in (tensor, tensor.t(), tensor[:, ::2], snapshot(tensor), snapshot([tensor.t()])[0]):
        back = unpack(*pack({"t": value}))["t"]
        assert back.device.type == "cpu"
        assert back.dtype == dtype
        expected = value.detach().cpu().contiguous()
        assert torch.equal(back.contiguous().view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
        assert b"application/safetensors" in to_json(*pack(value))


def test_work_still_queued_on_the_gpu_is_waited_for() -> None:
    matrix = torch.eye(4096, device="cuda")
    result = matrix
    for _ in range(20):
        result = result @ matrix
    taken = snapshot({"t": result})
    result.zero_()
    assert torch.equal(unpack(*pack(taken))["t"], torch.eye(4096))
