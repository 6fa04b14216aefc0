"""Tensor parallel text on two and four real ranks, against the whole model in one process."""

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


async def group(ranks: int) -> AsyncIterator[DistributedRunner]:
    runner = DistributedRunner(f"{EXAMPLE}:Generate", world_size=ranks, device="cpu")
    await runner.start(timeout=250, model="tiny")
    yield runner
    await runner.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(one_thread: None) -> AsyncIterator[DistributedRunner]:
    async for runner in group(2):
        yield runner


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def four(one_thread: None) -> AsyncIterator[DistributedRunner]:
    async for runner in group(4):
        yield runner


@pytest.fixture(params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> DistributedRunner:
    found: DistributedRunner = request.getfixturevalue(request.param)
    return found


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


async def test_ranks_write_what_one_process_writes(ranks: DistributedRunner) -> None:
    result = await ranks.invoke({"prompt": PROMPT, "max_tokens": 24}, timeout=100)
    text, count = one_process(24)
    assert (result["text"], result["tokens"]) == (text, count)
    assert result["finish"] == ("length" if count == 24 else "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_stream_holds_the_same_text_and_draws_follow_the_seed(
    ranks: DistributedRunner, temperature: float
) -> None:
    request = {"prompt": PROMPT, "max_tokens": 16, "temperature": temperature, "seed": 3}
    *updates, result = [event async for event in ranks.stream(request, timeout=100)]
    assert "".join(update["text"] for update in updates) == result["text"]
    assert [update["tokens"] for update in updates] == sorted({update["tokens"] for update in updates})
    assert updates[-1]["tokens"] == result["tokens"]
    assert await ranks.invoke(request, timeout=100) == result
    other = await ranks.invoke({**request, "seed": 4}, timeout=100)
    assert (other["text"] == result["text"]) == (temperature == 0)


async def test_a_cancelled_text_ends_at_one_token_and_leaves_nothing_behind(ranks: DistributedRunner) -> None:
    request = {"prompt": PROMPT, "max_tokens": 12}
    expected = await ranks.invoke(request, timeout=100)
    ticket = ranks.submit({"prompt": PROMPT, "max_tokens": 400, "temperature": 1.0}, streaming=True)
    async for update in ticket.updates():
        if update:
            ticket.cancel()
    with pytest.raises(RequestCancelled) as caught:
        await ticket.result()
    assert set(ticket.stopped_steps) == set(range(len(ranks.status.ranks)))
    assert set(ticket.stopped_steps.values()) == {caught.value.step}
    assert await ranks.invoke(request, timeout=100) == expected
    assert ranks.status.restarts == 0


@pytest.mark.parametrize(("field", "value"), [("prompt", ""), ("max_tokens", 0), ("temperature", -1)])
async def test_wrong_requests_name_the_field(two: DistributedRunner, field: str, value: Any) -> None:
    with pytest.raises(InvalidPayload, match=field):
        await two.invoke({"prompt": PROMPT, field: value}, timeout=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, which 2 ranks cannot divide; use 1 rank"),
        ({"model_type": "gpt2"}, "model: the layers of gpt2 cannot be split here: transformers has no plan for it"),
    ],
)
async def test_a_model_that_the_ranks_cannot_split_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(tiny_llama(), tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    runner = DistributedRunner(f"{EXAMPLE}:Generate", world_size=2, device="cpu")
    with pytest.raises(SetupFailed, match=message):
        await runner.start(timeout=250, model=str(tmp_path))
    await runner.stop()
