"""Tensor parallel text on two real ranks, against the whole model in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner
from drumline.errors import InvalidPayload, RequestCancelled, SetupFailed
from drumline.testing.tiny_lm import tiny_llama

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm_tensor" / "app.py"
PROMPT = "17+25="


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two() -> AsyncIterator[DistributedRunner]:
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    runner = DistributedRunner(f"{EXAMPLE}:Generate", world_size=2, device="cpu")
    await runner.start(timeout=250, model="tiny")
    yield runner
    await runner.stop()
    patch.undo()


def one_process(tokens: int) -> tuple[str, int]:
    """The most likely continuation, from the whole model, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama()).eval()
    ids = tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens:
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:]), len(ids) - start


async def test_two_ranks_write_what_one_process_writes(two: DistributedRunner) -> None:
    result = await two.invoke({"prompt": PROMPT, "max_tokens": 24}, timeout=100)
    text, count = one_process(24)
    assert (result["text"], result["tokens"]) == (text, count)
    assert result["finish"] == ("length" if count == 24 else "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_stream_holds_the_same_text_and_draws_follow_the_seed(
    two: DistributedRunner, temperature: float
) -> None:
    request = {"prompt": PROMPT, "max_tokens": 16, "temperature": temperature, "seed": 3}
    *updates, result = [event async for event in two.stream(request, timeout=100)]
    assert "".join(update["text"] for update in updates) == result["text"]
    assert [update["tokens"] for update in updates] == sorted({update["tokens"] for update in updates})
    assert updates[-1]["tokens"] == result["tokens"]
    assert await two.invoke(request, timeout=100) == result
    other = await two.invoke({**request, "seed": 4}, timeout=100)
    assert (other["text"] == result["text"]) == (temperature == 0)


async def test_a_cancelled_text_ends_at_one_token_and_leaves_nothing_behind(two: DistributedRunner) -> None:
    request = {"prompt": PROMPT, "max_tokens": 12}
    expected = await two.invoke(request, timeout=100)
    ticket = two.submit({"prompt": PROMPT, "max_tokens": 400, "temperature": 1.0}, streaming=True)
    async for update in ticket.updates():
        if update:
            ticket.cancel()
    with pytest.raises(RequestCancelled) as caught:
        await ticket.result()
    assert set(ticket.stopped_steps) == {0, 1}
    assert set(ticket.stopped_steps.values()) == {caught.value.step}
    assert await two.invoke(request, timeout=100) == expected
    assert two.status.restarts == 0


@pytest.mark.parametrize(("field", "value"), [("prompt", ""), ("max_tokens", 0), ("temperature", -1)])
async def test_wrong_requests_name_the_field(two: DistributedRunner, field: str, value: Any) -> None:
    with pytest.raises(InvalidPayload, match=field):
        await two.invoke({"prompt": PROMPT, field: value}, timeout=60)


async def test_heads_that_the_ranks_cannot_divide_are_refused_before_weights_are_looked_for(tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(), tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_key_value_heads": 1}))
    runner = DistributedRunner(f"{EXAMPLE}:Generate", world_size=2, device="cpu")
    with pytest.raises(SetupFailed, match="num_key_value_heads is 1, which 2 ranks cannot divide; use 1 rank"):
        await runner.start(timeout=250, model=str(tmp_path))
    await runner.stop()
