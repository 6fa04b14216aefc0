"""The language model trainings on real ranks: equal to one process, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from drumline.distributed import DistributedRunner
from drumline.errors import InvalidPayload, RankLost, RequestCancelled, SetupFailed, WorkerError
from drumline.runner.runner import RestartPolicy
from drumline.testing.tiny_lm import sums, tiny_llama
from drumline.toolkit import File

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKER = f"{Path(__file__).parent / 'lm_worker.py'}:Examples"
STEPS = 6
REQUEST = {"steps": STEPS, "batch": 4, "length": 16, "learning_rate": 3e-3, "seed": 5, "checkpoint_every": 2}

CASES: dict[str, dict[str, Any]] = {
    "zero-3": {"example": "lm_fsdp", "sharding": "parameters"},
    "zero-2": {"example": "lm_fsdp", "sharding": "gradients"},
    "zero-1": {"example": "lm_fsdp", "sharding": "optimizer"},
    "gpipe": {"example": "lm_pipeline", "schedule": "gpipe"},
    "1f1b": {"example": "lm_pipeline", "schedule": "1f1b"},
    "interleaved": {"example": "lm_pipeline", "schedule": "interleaved"},
    "zero-bubble": {"example": "lm_pipeline", "schedule": "zero-bubble"},
    "tensor": {"example": "lm_tensor"},
}
#: Differences from one process after 6 AdamW steps at losses around 5 and weights around 1, for every case: sums in
#: another order.
LOSS_BOUND = 5e-6
WEIGHT_BOUND = 5e-5

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def environment() -> Any:
    """One thread per rank and here: sums of floats depend on how they are split."""
    import torch

    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


async def group(ranks: int, folder: Path) -> AsyncIterator[DistributedRunner]:
    endless = RestartPolicy(max_restarts=10_000, backoff_seconds=0)
    runner = DistributedRunner(WORKER, world_size=ranks, device="cpu", restart=endless)
    await runner.start(timeout=200, model="tiny", checkpoints=str(folder))
    yield runner
    await runner.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all runs of this module, of both groups."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(environment: None, folder: Path) -> AsyncIterator[DistributedRunner]:
    async for runner in group(2, folder):
        yield runner


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def four(environment: None, folder: Path) -> AsyncIterator[DistributedRunner]:
    async for runner in group(4, folder):
        yield runner


class Reference:
    """What one process gets."""

    def __init__(self) -> None:
        import lm_worker
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from drumline.training import Batches, token_blocks, warmup_cosine

        model = AutoModelForCausalLM.from_pretrained(tiny_llama()).train()
        data = token_blocks(sums(), AutoTokenizer.from_pretrained(tiny_llama()), REQUEST["length"])
        self.losses = lm_worker.one_process(
            model,
            data,
            Batches(len(data), REQUEST["batch"], REQUEST["seed"]),
            STEPS,
            lambda step: warmup_cosine(step, total=STEPS, peak=REQUEST["learning_rate"], warmup=STEPS // 10),
        )
        self.weights = {name: value.detach() for name, value in model.named_parameters()}

    def check(self, result: dict[str, Any]) -> None:
        start = result["resumed_from"]
        assert len(result["losses"]) == STEPS - start
        assert worst(result["losses"], self.losses[start:]) <= LOSS_BOUND
        weights = weights_of(result)
        assert weights.keys() == self.weights.keys()
        assert max((weights[name] - value).abs().max().item() for name, value in self.weights.items()) <= WEIGHT_BOUND


@pytest.fixture(scope="module")
def reference(environment: None) -> Reference:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(Path(__file__).parent)
    try:
        return Reference()
    finally:
        patch.undo()


def worst(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def weights_of(result: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load

    found: dict[str, Any] = load(File(**result["weights"]).as_bytes())
    return found


async def train(runner: DistributedRunner, case: str, run: str, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = await runner.invoke({**REQUEST, **CASES[case], "run": run, **changes}, timeout=120)
    return result


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether a resumed run ended exactly as an uninterrupted one."""
    start = left["resumed_from"]
    return left["losses"] == right["losses"][start:] and left["weights"]["url"] == right["weights"]["url"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(two: DistributedRunner) -> Any:
    """Results of uninterrupted runs on two ranks, by case."""
    results: dict[str, dict[str, Any]] = {}

    async def get(case: str) -> dict[str, Any]:
        if case not in results:
            results[case] = await train(two, case, "whole-" + case)
        return {**results[case], "weights": dict(results[case]["weights"])}

    return get


# -- equal to one process


@every_case
async def test_two_ranks_train_as_one_process_does(whole: Any, reference: Reference, case: str) -> None:
    result = await whole(case)
    assert result["weights"]["content_type"] == "application/safetensors", "who saves it gets a file of that name"
    reference.check(result)


@every_case
async def test_four_ranks_train_as_one_process_does(four: DistributedRunner, reference: Reference, case: str) -> None:
    reference.check(await train(four, case, "four-" + case))


@pytest.mark.parametrize("case", ["zero-3", "zero-1", "zero-bubble", "tensor"])
async def test_another_number_of_ranks_goes_on(
    two: DistributedRunner, four: DistributedRunner, reference: Reference, folder: Path, case: str
) -> None:
    run = "regrouped-" + case
    await train(two, case, run)
    shutil.rmtree(folder / run / f"step-{STEPS:08d}")
    result = await train(four, case, run)
    assert result["resumed_from"] == STEPS - 2
    reference.check(result)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
async def test_a_pipeline_infers_exactly_what_one_process_does(two: DistributedRunner, schedule: str) -> None:
    import torch

    from drumline.testing.tiny_lm import build_llama

    result = await two.invoke({"example": "infer_after_a_step", "schedule": schedule}, timeout=60)
    tokens = torch.arange(4 * 9).reshape(4, 9)[:, :-1]
    with torch.no_grad():
        expected = torch.cat([build_llama()(row[None], use_cache=False).logits for row in tokens])
    assert (result["logits"] - expected).abs().max().item() == 0.0


@pytest.mark.parametrize("ranks", [2, 4])
async def test_inference_with_the_schedule_of_a_training_names_the_rank_that_failed(
    two: DistributedRunner, four: DistributedRunner, ranks: int
) -> None:
    runner = two if ranks == 2 else four
    with pytest.raises(WorkerError, match=f"rank {ranks - 1}: TypeError"):
        await runner.invoke({"example": "eval_without_a_target"}, timeout=60)
    assert "logits" in await runner.invoke({"example": "infer_after_a_step", "schedule": "1f1b"}, timeout=60)


async def test_norms_of_queries_and_keys_get_the_gradients_of_all_heads(
    two: DistributedRunner, reference: Reference
) -> None:
    from lm_worker import train_qwen3

    from drumline.testing.tiny_lm import build_qwen3

    result = await two.invoke({"example": "split_qwen3", "steps": 8}, timeout=60)
    assert worst(result["losses"], train_qwen3(build_qwen3(), 8)) <= 1e-4


# -- streams


@every_case
async def test_a_stream_tells_every_step_and_ends_with_the_same_result(
    two: DistributedRunner, whole: Any, case: str
) -> None:
    request = {**REQUEST, **CASES[case], "run": "streamed-" + case}
    *updates, result = [event async for event in two.stream(request, timeout=120)]
    told = [update["progress"] for update in updates]
    assert [each["done"] for each in told] == list(range(1, STEPS + 1))
    assert [each["loss"] for each in told] == result["losses"]
    assert told[0]["lr"] == REQUEST["learning_rate"]
    assert told[-1]["lr"] < told[0]["lr"]
    assert all(each["samples_per_second"] > 0 for each in told)
    assert told[-1]["eta_seconds"] == 0
    assert same(result, await whole(case))


# -- ends before the end


@every_case
async def test_a_cancelled_run_stops_at_one_step_and_goes_on_later(
    two: DistributedRunner, whole: Any, case: str
) -> None:
    ticket = two.submit({**REQUEST, **CASES[case], "run": "cancelled-" + case}, streaming=True)
    done = 0
    async for _ in ticket.updates():
        done += 1
        if done == 3:
            ticket.cancel()
    with pytest.raises(RequestCancelled) as caught:
        await ticket.result()
    assert set(ticket.stopped_steps) == {0, 1}
    assert set(ticket.stopped_steps.values()) == {caught.value.step}
    result = await train(two, case, "cancelled-" + case)
    assert result["resumed_from"] in (2, 4)
    assert same(result, await whole(case))


@every_case
async def test_a_killed_run_goes_on_with_the_same_losses(two: DistributedRunner, whole: Any, case: str) -> None:
    run = f"killed-{case}"
    # Every step is the last one, and every rank the killed one, for some case.
    rank = list(CASES).index(case) % 2
    last = 1 + list(CASES).index(case) % (STEPS - 1)
    ticket = two.submit({**REQUEST, **CASES[case], "run": run}, streaming=True)
    done = 0
    async for _ in ticket.updates():
        done += 1
        if done == last:
            kill(two, rank)
    with pytest.raises(RankLost) as caught:
        await ticket.result()
    assert caught.value.rank == rank
    result = await train(two, case, run)
    assert result["resumed_from"] >= (last - 1) // 2 * 2
    assert same(result, await whole(case))


async def test_kills_at_any_time_also_inside_of_a_checkpoint_cost_nothing_but_time(
    two: DistributedRunner, whole: Any, folder: Path
) -> None:
    chance = random.Random(7)
    request = {**REQUEST, **CASES["zero-3"], "run": "storm", "checkpoint_every": 1}
    kills = 0
    while kills < 4:
        ticket = two.submit(request)
        timer = asyncio.get_running_loop().call_later(chance.uniform(0.05, 1.5), kill, two, chance.randrange(2))
        try:
            result = await asyncio.wait_for(ticket.result(), 120)
        except RankLost:
            kills += 1
            continue
        finally:
            timer.cancel()
        shutil.rmtree(folder / "storm")
    result = await train(two, "zero-3", "storm", checkpoint_every=1)
    assert same(result, await whole("zero-3"))
    assert sorted(path.name for path in (folder / "storm").iterdir()) == ["step-00000005", "step-00000006"]


async def test_a_half_written_checkpoint_is_not_seen_and_goes_away(
    two: DistributedRunner, whole: Any, folder: Path
) -> None:
    half = folder / "half" / ".step-00000004"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    result = await train(two, "zero-3", "half")
    assert result["resumed_from"] == 0
    assert same(result, await whole("zero-3"))
    assert not half.exists()


def kill(runner: DistributedRunner, rank: int) -> None:
    pid = runner.status.ranks[rank].pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


# -- wrong plans


async def test_a_run_goes_on_only_with_the_same_facts(two: DistributedRunner, whole: Any) -> None:
    await whole("zero-3")
    with pytest.raises(InvalidPayload, match=r"learning_rate: the run in whole-zero-3 has 0\.003 at step 6"):
        await train(two, "zero-3", "whole-zero-3", learning_rate=0.1)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("zero-3", {"batch": 5}, "batch: 5 samples cannot be divided by 2 ranks; use 6"),
        ("1f1b", {"batch": 6}, "batch: 6 samples cannot be cut into 4 equal microbatches; use 8"),
        ("1f1b", {"microbatches": 1}, "microbatches: 1f1b on 2 ranks needs at least 2, not 1"),
        ("zero-bubble", {"microbatches": 3}, "microbatches: zero-bubble on 2 ranks needs a multiple of 2, not 3"),
        ("zero-1", {"text": "data:text/plain,short"}, "text: 5 tokens are less than one block of 16 + 1"),
    ],
)
async def test_a_request_that_cannot_be_split_is_refused(
    two: DistributedRunner, case: str, changes: dict[str, Any], message: str
) -> None:
    before = two.status.restarts
    with pytest.raises(InvalidPayload) as caught:
        await train(two, case, "refused", **changes)
    assert message in str(caught.value)
    assert two.status.restarts == before


def without_weights(folder: Path, **changes: Any) -> str:
    """The tiny model's folder with another configuration and no weights."""
    shutil.copytree(tiny_llama(), folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("example", "changes", "message"),
    [
        ("lm_tensor", {"num_key_value_heads": 1}, "num_key_value_heads is 1, which 2 ranks cannot divide; use 1 rank"),
        ("lm_fsdp", {"model_type": "gpt2"}, "model: gpt2 is no language model with its layers in model.layers"),
        ("lm_fsdp", {"model_type": "t5"}, "model: t5 is no language model with its layers in model.layers"),
        ("lm_tensor", {"intermediate_size": 129}, "intermediate_size is 129, which 2 ranks cannot divide; use 1 rank"),
        ("lm_tensor", {"model_type": "bloom"}, "model: the layers of bloom cannot be split here"),
        ("lm_pipeline", {"num_hidden_layers": 1}, "the model has 1 layers; use at most 1 ranks"),
        ("lm_pipeline", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("lm_pipeline", {"model_type": "gpt2"}, "model: gpt2 cannot be cut here; use one of llama"),
    ],
)
async def test_a_model_that_cannot_be_split_is_refused_before_its_weights_are_looked_for(
    two: DistributedRunner, tmp_path: Path, example: str, changes: dict[str, Any], message: str
) -> None:
    model = without_weights(tmp_path, **changes)
    result = await two.invoke({"example": "refusal", "of": example, "model": model}, timeout=60)
    assert message in result["error"]


async def test_a_group_that_cannot_split_its_model_does_not_start(environment: None, tmp_path: Path) -> None:
    runner = DistributedRunner(WORKER, world_size=3, device="cpu")
    with pytest.raises(SetupFailed) as caught:
        await runner.start(timeout=200, model=without_weights(tmp_path), only=["lm_tensor"])
    await runner.stop()
    assert caught.value.exception_type == "drumline.errors.ConfigurationError"
    assert "model: num_attention_heads is 4, which 3 ranks cannot divide; use 2 ranks" in str(caught.value)
