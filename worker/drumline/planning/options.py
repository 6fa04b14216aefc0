"""Every plan that a model allows on a number of GPUs, with its costs. PURE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from drumline.diffusion.plan import ParallelPlan, PlanError
from drumline.errors import ConfigurationError, InvalidPayload
from drumline.planning.diffusion import Denoiser
from drumline.planning.language import LanguageModel
from drumline.planning.option import Machine, Option, all_reduce, gather
from drumline.training.stage_plan import StagePlan

_HALF = 2  # bytes of a bfloat16
_FULL = 4  # bytes of a float32


def draw(
    model: Denoiser, machine: Machine, width: int, height: int, short: int = _HALF
) -> tuple[list[Option], list[str]]:
    """Return the plans for one image per data-parallel group, and why others are refused.

    Args:
        model: to draw with.
        machine: its GPUs.
        width: pixels.
        height: pixels.
        short: bytes of a number: 2 for bfloat16.
    """
    options, refused = [], []
    for plan in _plans(machine.gpus, branches=2 if model.batched else 1):
        try:
            plan.check(machine.gpus, model.shape)
            if model.kind != "unet":
                text = -(-model.text // plan.sequence) * plan.sequence  # a worker pads the prompt
                plan.check_request(model.shape, width=width, height=height, text_tokens=text)
        except (PlanError, InvalidPayload) as error:
            refused.append(str(error))
        else:
            options.append(_draw(model, plan, machine, width, height, short))
    return options, sorted(set(refused))


def _plans(gpus: int, branches: int) -> Iterator[ParallelPlan]:
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for data, cfg, pipefusion, ring, ulysses in product(sizes, (1, 2)[:branches], sizes, sizes, sizes):
        taken = data * cfg * pipefusion * ring * ulysses
        if gpus % taken:
            continue
        try:
            yield ParallelPlan(
                data=data, cfg=cfg, pipefusion=pipefusion, ring=ring, ulysses=ulysses, tensor=gpus // taken
            )
        except PlanError:
            continue  # numbers that never go together


def _draw(model: Denoiser, plan: ParallelPlan, machine: Machine, width: int, height: int, short: int) -> Option:
    image = model.image_tokens(width, height)
    tokens = image + (model.text if model.kind != "unet" else 0)
    images = (2 if model.batched else 1) / plan.cfg  # in one forward pass
    hidden, blocks = model.hidden, model.double + model.single
    mine = tokens / plan.sequence
    row = hidden * images * short  # bytes of one token
    wire = blocks * gather(4 * mine * row, plan.ulysses)
    wire += blocks * gather(2 * tokens / plan.ulysses * row, plan.ring)
    wire += all_reduce((2 * model.double + model.single) * tokens * row, plan.tensor)
    if plan.pipefusion > 1:
        wire += mine * row
    if plan.cfg == 2:
        wire += image * model.channels * short
    staged, layers = model.largest_stage(plan.pipefusion)
    weights: float = model.parameters - model.blocks + staged
    weights -= model.split * (1 - 1 / plan.tensor)
    cache = 2 * tokens / plan.ulysses * row * layers if plan.pipefusion > 1 else 0.0
    peak = model.peak_numbers(mine) * images * short
    if plan.tensor > 1:  # widths within a block are split, the residual stream and its copies are not
        peak *= 1 / 3 + 2 / 3 / plan.tensor
    shares = plan.sequence * plan.tensor * plan.pipefusion
    return Option(
        plan=str(plan),
        weights=(weights + model.companions) * short,
        state=0.0,
        cache=cache,
        activations=peak,
        wire=wire,
        compute=model.operations(tokens) * images / shares / machine.operations,
        speed=plan.data,
        exact=plan.pipefusion == 1,
    )


def generate(model: LanguageModel, machine: Machine, batch: int, context: int) -> tuple[list[Option], list[str]]:
    """Return the plans for generating text: one step is one token for each of ``batch`` texts of ``context`` tokens."""
    options, refused = [], []
    for tensor in (n for n in range(1, machine.gpus + 1) if machine.gpus % n == 0):
        plan = ParallelPlan(tensor=tensor, data=machine.gpus // tensor)
        try:
            _check_heads(model, tensor)
        except ConfigurationError as error:
            refused.append(str(error))
            continue
        texts = -(-batch // plan.data)
        split = model.layers * model.split_per_layer
        weights = (model.parameters - split + split / tensor) * _HALF
        cache = 2 * model.layers * model.keys / tensor * context * texts * _HALF
        options.append(
            Option(
                plan=str(plan),
                weights=weights,
                state=0.0,
                cache=cache,
                activations=texts * (model.vocabulary * _FULL + 8 * model.intermediate * _HALF),
                wire=all_reduce(2 * model.layers * texts * model.hidden * _HALF, tensor),
                # One token reads all weights and the cache once: that is what takes the time.
                compute=max(
                    (weights + cache) / machine.bandwidth,
                    model.operations(texts, context) / tensor / machine.operations,
                ),
                speed=batch,
            )
        )
    return options, refused


def train(
    model: LanguageModel, machine: Machine, batch: int, length: int, short: int = _HALF
) -> tuple[list[Option], list[str]]:
    """Return the ways to train all weights: float32 with AdamW, 16-bit computing, ``batch`` samples per step.

    Args:
        model: to train.
        machine: its GPUs.
        batch: samples per step over all ranks.
        length: tokens of each.
        short: bytes of a number in computing: 2 for bfloat16.
    """
    gpus = machine.gpus
    options, refused = [], []
    compute = 3 * model.operations(batch * length, length // 2) / gpus / machine.operations
    everything, block = model.parameters, model.layer
    if batch % gpus:
        refused.append(f"batch: {batch} samples cannot be divided by {gpus} ranks, for data parallelism and ZeRO")
    else:
        saved = _saved(model, batch / gpus * length, 1, model.layers, short)
        gradients = all_reduce(_FULL * everything, gpus)
        shards = gather(short * everything, gpus)
        summed = gather(_FULL * everything, gpus)
        for plan, weights, state, wire in (
            # DDP's buckets are a second copy of the gradients.
            (f"data={gpus} (DDP)", _FULL * everything, 16 * everything, gradients),
            (
                f"zero-1={gpus}",
                _FULL * everything,
                8 * everything + 8 * everything / gpus,
                gradients + gather(_FULL * everything, gpus),
            ),
            (
                f"zero-2={gpus}",
                (_FULL / gpus + short) * everything,
                12 * everything / gpus + 2 * _FULL * block,
                shards + summed,
            ),
            (
                f"zero-3={gpus}",
                _FULL * everything / gpus + 2 * short * max(block, model.embedding),
                12 * everything / gpus + 2 * _FULL * block,
                2 * shards + summed,
            ),
        ):
            options.append(Option(plan, weights, state, 0.0, saved, wire, compute, batch))
    for build in (_tensor, _pipeline):
        try:
            options.append(build(model, gpus, batch, length, compute, short))
        except (ConfigurationError, InvalidPayload) as error:
            refused.append(str(error))
    return options, refused


def _tensor(model: LanguageModel, gpus: int, batch: int, length: int, compute: float, short: int) -> Option:
    _check_heads(model, gpus)
    split = model.layers * model.split_per_layer
    held = model.parameters - split + split / gpus
    # Forward: after attention and after the feed-forward layer. Backward: at the inputs of q, k, v, gate and up.
    wire = all_reduce(7 * model.layers * batch * length * model.hidden * short, gpus)
    saved = _saved(model, batch * length, gpus, model.layers, short)
    return Option(f"tensor={gpus}", _FULL * held, 12 * held, 0.0, saved, wire, compute, batch)


def _pipeline(model: LanguageModel, gpus: int, batch: int, length: int, compute: float, short: int) -> Option:
    if model.tied and gpus > 1:
        raise ConfigurationError("pipeline: the first and last layer share their weights and would lie on two ranks")
    microbatches = max((m for m in range(1, min(batch, 4 * gpus) + 1) if batch % m == 0), default=1)
    stages = StagePlan(model.layers, gpus, "1f1b", microbatches)
    held = max(len(stages.layers_of(stage)) for stage in range(stages.stages)) * model.layer
    held += model.embedding + model.hidden  # the first stage's tokens, or the last one's output and norm
    held += model.embedding if gpus == 1 else 0
    # The first stage keeps as many microbatches as there are stages before the first comes back.
    kept = min(gpus, microbatches) / microbatches
    layers = len(stages.layers_of(0))
    saved = _saved(model, batch * length * kept, 1, layers, short, logits=batch * length / microbatches)
    # Activations to the next stage and gradients to the one before; the two at the ends send only one of them.
    wire = min(gpus - 1, 2) * batch * length * model.hidden * short
    name = f"pipeline={gpus} (1f1b, {microbatches} microbatches)"
    return Option(name, _FULL * held, 12 * held, 0.0, saved, wire, compute / (1 - stages.bubble), batch)


def _saved(
    model: LanguageModel, tokens: float, tensor: int, layers: int, short: int, *, logits: float | None = None
) -> float:
    kept = tokens * (layers * model.saved_per_token(tensor) + 3 * model.hidden) * short
    # Logits, their logarithms and their gradients, in float32.
    return kept + 3 * (tokens if logits is None else logits) * model.vocabulary * _FULL


def _check_heads(model: LanguageModel, ranks: int) -> None:
    for what, number in (("heads", model.heads), ("key-value heads", model.kv_heads), ("channels", model.intermediate)):
        if number % ranks:
            raise ConfigurationError(f"tensor={ranks} does not divide the {number} {what} of {model.name}")
