"""What goes wrong in diffusers' parallelism, and that we refuse it or get it right. `traps.py` has the ranks' part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drumline.distributed import DistributedRunner
from drumline.errors import WorkerError

pytestmark = pytest.mark.asyncio(loop_scope="session")

BOUND = 5e-6


@pytest.fixture(params=["two", "four"])
def ask(request: pytest.FixtureRequest) -> Any:
    runner: DistributedRunner = request.getfixturevalue(request.param)

    async def ask(trap: str) -> Any:
        found = await runner.invoke({"example": "traps", "trap": trap}, timeout=120)
        assert runner.status.restarts == 0
        return found

    return ask


async def test_sd3_is_right_with_us_and_silently_wrong_with_a_plan_alone(ask: Any) -> None:
    found = await ask("sd3")
    assert found["ours"] <= BOUND
    assert found["theirs"] > 1e-3, "diffusers learned to split SD3: our own processors can go"
    assert "JointAttnProcessor2_0" in found["refusal"]


async def test_diffusers_alone_refuses_cpu_ranks_and_what_we_lend_it_is_taken_back(ask: Any) -> None:
    found = await ask("cpu")
    assert found["context"].startswith("ZeroDivisionError"), "what we lend it is needed no more"
    assert found["tensor"], "what we lend it is needed no more"
    assert found["restored"]


async def test_uneven_tokens_in_a_forward_are_named(ask: Any) -> None:
    found = await ask("uneven")
    for refusal in found.values():
        assert "15 tokens cannot be shared evenly by" in refusal


async def test_diffusers_own_way_to_split_uneven_tokens_fails_on_cpu_ranks(ask: Any) -> None:
    assert (await ask("anything")).startswith("RuntimeError"), "it works now: uneven tokens need not be refused"


@pytest.mark.linux
async def test_what_ranks_share_has_no_name_that_one_that_ends_could_unlink(ask: Any) -> None:
    found = await ask("shared_memory")
    assert found["shared"], "the page of steps and cancels"
    # tqdm's lock is a semaphore of multiprocessing, whose name goes as soon as it is made, like that of a memfd.
    assert all(name.endswith(" (deleted)") for name in found["shared"]), found
    assert found["tracker"] is None


async def test_parallelism_goes_on_once(ask: Any) -> None:
    for refusal in await ask("twice"):
        assert "parallel already: enable it once" in refusal


async def test_lora_layers_beside_split_weights_are_refused(ask: Any) -> None:
    assert "has LoRA layers" in await ask("lora")


async def test_branches_that_run_one_after_the_other_are_not_halved(ask: Any) -> None:
    assert "not known to run both branches of guidance in one forward; use FluxSampler" in await ask("separate")


async def test_our_own_way_to_split_flux_is_as_good_as_diffusers(ask: Any) -> None:
    found = await ask("fallback")
    assert found["ours"] <= BOUND
    assert found["theirs"] <= BOUND
    assert "our own processors know ulysses= only" in found["ring"]


async def test_every_rank_holds_its_slices_of_the_weights_only(ask: Any) -> None:
    found = await ask("weights")
    assert max(found["differences"]) <= BOUND
    assert all(0.25 < share < 0.75 for share in found["held"])


async def test_kinds_of_parallelism_beside_each_other_keep_apart(four: DistributedRunner) -> None:
    found = await four.invoke({"example": "traps", "trap": "beside"}, timeout=120)
    assert len(found) == 4
    for plan, one in found.items():
        assert one["difference"] <= BOUND, plan
        ranks = len(one["seeds"])
        if "data" in plan:
            assert one["seeds"] == [5] * (ranks // 2) + [6] * (ranks // 2)
            assert one["gathered"] == [0, ranks // 2]
        else:
            assert set(one["seeds"]) == {5}
            assert one["gathered"] == [0]


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_rank_that_fails_amid_the_stages_leaves_no_patch_for_the_next_request(start: Any, failing: int) -> None:
    runner = await start(2, cancel_grace=1.0)
    request = {"example": "traps", "trap": "stages"}
    expected = (await runner.invoke(request, timeout=120))["image"]
    for _ in range(3):
        with pytest.raises(WorkerError, match=f"rank {failing}: RuntimeError: out of paint"):
            await runner.invoke({**request, "failing": failing}, timeout=120)
        again = (await runner.invoke(request, timeout=120))["image"]
        assert torch.equal(again, expected)


async def test_without_diffusers_own_way_ours_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import torch

    from drumline.diffusion import shape_of
    from drumline.testing import tiny_flow

    with torch.device("meta"):
        model = tiny_flow.flux_transformer()
    assert shape_of(model).sequence == "diffusers"
    monkeypatch.delattr(diffusers.models.modeling_utils.ModelMixin, "enable_parallelism")
    assert shape_of(model).sequence == "drumline"
