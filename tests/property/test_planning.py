"""`drumline plan`: what must hold for any model, number of GPUs and workload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from drumline.cli import app
from drumline.cli.plan import parse_memory
from drumline.diffusion.plan import ParallelPlan
from drumline.errors import ConfigurationError
from drumline.planning import guide, options
from drumline.planning.advice import advise
from drumline.planning.diffusion import Denoiser
from drumline.planning.known import KNOWN, find
from drumline.planning.language import LanguageModel
from drumline.planning.option import LINKS, Machine, Option, all_reduce, gather
from drumline.planning.workload import Workload, plans_for

GPUS = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
MEMORY = st.sampled_from([16 << 30, 24 << 30, 80 << 30, 192 << 30])
LINK = st.sampled_from(sorted(LINKS))
machines = st.builds(Machine, GPUS, MEMORY, LINK)
languages = st.builds(
    LanguageModel,
    st.just("some/model"),
    layers=st.integers(1, 96),
    hidden=st.sampled_from([64, 1024, 4096, 8192]),
    intermediate=st.sampled_from([128, 3072, 14336]),
    heads=st.sampled_from([4, 16, 32, 64]),
    kv_heads=st.sampled_from([1, 4, 8]),
    head_dim=st.sampled_from([16, 64, 128]),
    vocabulary=st.integers(100, 200_000),
    tied=st.booleans(),
    biased=st.booleans(),
    normed=st.booleans(),
)
denoisers = st.sampled_from([model for model in KNOWN.values() if isinstance(model, Denoiser)])
sides = st.sampled_from([256, 512, 1024, 1536])
runner = CliRunner()


def by_way(found: list[Option]) -> dict[str, Option]:
    return {option.plan.partition("=")[0]: option for option in found}


@given(languages, machines, st.integers(1, 64), st.sampled_from([16, 2048]))
def test_each_stage_of_zero_splits_more(model: LanguageModel, machine: Machine, batch: int, length: int) -> None:
    found, _ = options.train(model, machine, batch * machine.gpus, length)
    ways = by_way(found)
    held = {name: ways[name].weights + ways[name].state for name in ("data", "zero-1", "zero-2", "zero-3")}
    assert held["data"] >= held["zero-1"]
    assert ways["zero-2"].state == ways["zero-3"].state
    assert ways["zero-2"].wire <= ways["zero-3"].wire <= ways["zero-1"].wire
    if machine.gpus == 1:
        assert all(ways[name].wire == 0 for name in held)
    for option in found:
        assert min(option.weights, option.state, option.cache, option.activations, option.wire) >= 0
        assert option.weights + option.state >= 16 * model.parameters / machine.gpus * 0.999
        assert option.compute > 0


@given(languages, MEMORY, st.sampled_from([1, 2, 4, 8]))
def test_twice_the_gpus_need_less_memory_each(model: LanguageModel, memory: int, gpus: int) -> None:
    few, many = (by_way(options.train(model, Machine(n, memory), 64, 512)[0]) for n in (gpus, 2 * gpus))
    for way in few.keys() & many.keys() - {"data"}:
        assert many[way].memory <= few[way].memory * 1.0001


@given(languages, machines, st.integers(1, 64), st.integers(1, 4096))
def test_generation_holds_every_weight_somewhere(
    model: LanguageModel, machine: Machine, batch: int, context: int
) -> None:
    found, _ = options.generate(model, machine, batch, context)
    for option in found:
        assert option.weights * machine.gpus >= 2 * model.parameters * 0.999
        assert option.weights <= 2 * model.parameters
        assert (option.wire > 0) == ("tensor" in option.plan)


@given(denoisers, machines, sides, sides)
def test_plans_of_a_denoiser_use_every_gpu_and_refusals_say_why(
    model: Denoiser, machine: Machine, width: int, height: int
) -> None:
    found, refused = options.draw(model, machine, width, height)
    assert len({option.plan for option in found}) == len(found)
    for option in found:
        plan = ParallelPlan(
            **{name: int(n) for name, n in (p.split("=") for p in option.plan.split(" x ") if "=" in p)}
        )
        assert plan.world_size == machine.gpus
        plan.check(machine.gpus, model.shape)
        assert (option.wire == 0) == (plan.data == machine.gpus)
        assert option.exact == (plan.pipefusion == 1)
        assert option.weights >= 2 * (model.parameters / (plan.tensor * plan.pipefusion) + model.companions) * 0.999
    assert all(reason for reason in refused)


@given(st.floats(0, 1e12), st.integers(1, 64))
def test_a_ring_sends_its_share(size: float, ranks: int) -> None:
    assert all_reduce(size, ranks) == pytest.approx(2 * gather(size, ranks))
    assert gather(size, ranks) <= size
    assert gather(size, 1) == 0


@given(languages | denoisers, machines, st.sampled_from(["latency", "throughput"]))
def test_the_advice_fits_and_nothing_exact_that_fits_is_better(
    model: LanguageModel | Denoiser, machine: Machine, goal: str
) -> None:
    if isinstance(model, Denoiser):
        found, _ = options.draw(model, machine, 1024, 1024)
    else:
        found, _ = options.generate(model, machine, 8, 2048)
    advice = advise(found, machine, goal)
    fitting = [option for option in found if option.fits(machine)]
    if not fitting:
        assert advice.best is None
        assert "nothing fits" in advice.why or "no plan" in advice.why
        return
    best = advice.best
    assert best is not None
    assert best.fits(machine)
    for other in fitting:
        if other.exact or not best.exact:
            if goal == "latency":
                assert best.seconds(machine) <= other.seconds(machine)
            else:
                assert best.rate(machine) >= other.rate(machine)


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_are_found_by_either_name(name: str) -> None:
    assert find(name) is find(name.split("/")[1].lower()) is KNOWN[name]
    assert plans_for(name, Machine(2, 80 << 30), Workload())[0]


@pytest.mark.parametrize(
    ("text", "size"), [("80Gi", 80 << 30), ("24G", 24 * 10**9), ("141GiB", 141 << 30), ("1.5Ti", 3 << 39), ("100", 100)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "80Q", "Gi", "-1Gi", "0", "80 Gi of it"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--memory: .* is no amount of memory; write e"):
        parse_memory(text)


# -- the command


def test_the_command_recommends_and_explains() -> None:
    done = runner.invoke(app, ["plan", "FLUX.1-dev", "--gpus", "4", "-o", "json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert answer["recommended"] == "ulysses=4"
    assert "shortest step" in answer["why"]
    assert {plan["plan"] for plan in answer["plans"]} >= {"data=4", "pipefusion=4", "tensor=4", "ulysses=4"}
    shown = runner.invoke(app, ["plan", "FLUX.1-dev", "--gpus", "4"], env={"COLUMNS": "200"})
    assert "recommended: ulysses=4" in shown.output


def test_a_folder_with_a_configuration_is_planned(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8}
    config |= {"intermediate_size": 128, "vocab_size": 258, "num_key_value_heads": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = runner.invoke(app, ["plan", str(tmp_path), "--gpus", "2", "--train", "-o", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["recommended"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody/knows", "--gpus", "2"], "MODEL: 'nobody/knows' is no folder and none of"),
        (["FLUX.1-dev", "--gpus", "2", "--train"], "--train: planned for language models only"),
        (["FLUX.1-dev", "--gpus", "2", "--memory", "lots"], "--memory: 'lots' is no amount of memory"),
    ],
)
def test_wrong_use_is_explained(arguments: list[str], message: str) -> None:
    done = runner.invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is needed"),
        ('{"model_type": "llama", "num_attention_heads": 4}', "num_hidden_layers is missing"),
        ('{"_class_name": "FluxTransformer2DModel"}', "num_attention_heads is missing"),
        ('{"model_type": "mamba"}', "is not planned for"),
    ],
)
def test_configurations_that_cannot_be_planned_say_why(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigurationError, match=message):
        find(str(tmp_path))


def test_the_guide_shows_what_the_command_computes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "choosing-a-strategy.md").read_text()
    assert guide.filled(page) == page, (
        "run `.venv/bin/python -m drumline.planning.guide docs/guide/choosing-a-strategy.md`"
    )
