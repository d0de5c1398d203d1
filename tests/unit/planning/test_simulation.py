"""What a simulated step says beside its peak, and what it refuses."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.speed.flops import count_flops
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.planning.plan import make_plan
from memdlm.planning.simulation import PARTS, StepFigures, simulate_step
from memdlm.planning.sizes import count_parameters
from memdlm.planning.worst_case import worst_step
from memdlm.training.config import MemDLMConfig
from memdlm.training.outer_step import OuterStep, StepPlan

from .conftest import BATCH, LENGTH, SIZES, VOCABULARY, arguments_for, build

MIB = 2**20


def simulate(
    arguments: MemDLMConfig,
    family: str = "llada",
    is_lora: bool = False,
    dtype: torch.dtype = torch.float32,
    **step: int,
) -> StepFigures:
    model, adapter = build(family, "meta", dtype, is_lora)
    return simulate_step(model, adapter, arguments, plan_for(arguments, **step))


def plan_for(arguments: MemDLMConfig, length: int = LENGTH, response: int = LENGTH - 1) -> StepPlan:
    return worst_step(BATCH, length, response, arguments.objective, arguments.memory)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("has_memory", [False, True])
def test_flops_are_those_that_the_benchmark_counts(folder, family, has_memory) -> None:
    arguments = arguments_for(folder, has_memory, gradient_accumulation_steps=3)
    model, _ = build(family, "meta", torch.bfloat16)
    outer = OuterStep(model.train(), arguments.memory)
    plan = plan_for(arguments).to(torch.device("meta"))

    def step() -> None:
        outer.forward(model, plan).loss.backward()
        outer.release()

    assert simulate(arguments, family, dtype=torch.bfloat16).flops == 3 * count_flops(step)


def test_parts_are_what_they_are_called(folder) -> None:
    figures = simulate(arguments_for(folder, bf16=True), "llada_moe", is_lora=True)
    assert tuple(figures.peak) == tuple(figures.largest) == PARTS
    model, adapter = build("llada_moe", "meta", is_lora=True)
    parameters = dict(model.named_parameters())
    trained = sum(4 * parameters[name].numel() for name in adapter)
    frozen = [*(p for name, p in parameters.items() if name not in adapter), *model.buffers()]
    assert figures.largest["weights"] == sum(t.nbytes for t in frozen)
    assert figures.largest["adapter"] == figures.largest["gradients"] == trained
    num_tensors = len(adapter)
    assert figures.largest["optimizer"] == 2 * trained + 4 * num_tensors  # and a step count each
    # Logits in bf16 for the outer loss, of which the loss needs copies in fp32.
    num_logits = BATCH * (LENGTH - 1) * VOCABULARY
    assert (2 + 4 + 4) * num_logits <= figures.largest["logits"] <= (2 + 4 + 4 + 4) * num_logits
    # phi, its gradient, and no more than one phi before it.
    assert figures.num_memories == BATCH
    num_bytes = 4 * figures.num_fast * figures.num_memories
    assert 2 * num_bytes <= figures.largest["fast_weights"] <= 3 * num_bytes
    assert figures.peak_bytes == sum(figures.peak.values())
    assert all(figures.peak[part] <= figures.largest[part] for part in PARTS)


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_logits_keep_to_their_budget(folder, is_lora, loss) -> None:
    num_logits = BATCH * (LENGTH - 1) * VOCABULARY
    peaks = {}
    for budget in (1, 256):
        objective = ObjectiveConfig(time_epsilon=0.99999, logits_budget=budget)
        memory = MemoryConfig(rank=8, loss=loss)
        arguments = arguments_for(folder, objective=objective, memory=memory)
        figures = simulate(arguments, "llada", is_lora)
        peaks[budget] = figures.largest["logits"]
    copies = {"cross_entropy": 3, "kl": 7}[loss]  # of a loss and its gradient
    assert peaks[1] <= copies * MIB
    assert num_logits * 4 > 3.8 * MIB and peaks[256] > 3.8 * peaks[1]


def test_without_a_memory_there_are_no_fast_weights(folder) -> None:
    figures = simulate(arguments_for(folder, has_memory=False))
    assert figures.num_fast == figures.num_memories == figures.largest["fast_weights"] == 0


def test_attention_keeps_no_scores_of_all_pairs(folder) -> None:
    long = 8 * LENGTH
    sizes = TinySizes(width=64, num_heads=4, mlp_width=64, context_length=long)
    model, adapter = build("llada", "meta", sizes=sizes)
    arguments = arguments_for(folder, has_memory=False)
    figures = simulate_step(model, adapter, arguments, plan_for(arguments, long, response=1))
    scores = BATCH * sizes.num_heads * long**2 * 4  # of one layer
    assert figures.largest["activations"] < scores / 2


def test_memory_grows_with_the_response_and_shrinks_with_checkpointing(folder) -> None:
    arguments = arguments_for(folder)
    whole, short = simulate(arguments), simulate(arguments, response=LENGTH // 4)
    assert short.largest["logits"] < whole.largest["logits"] / 3
    assert short.peak_bytes < whole.peak_bytes
    checkpointed = simulate(arguments_for(folder, gradient_checkpointing=True))
    assert checkpointed.largest["activations"] < whole.largest["activations"] / 2
    assert checkpointed.flops > whole.flops


def test_accumulated_micro_batches_need_memory_once_and_flops_each_time(folder) -> None:
    once, twice, often = (
        simulate(arguments_for(folder, gradient_accumulation_steps=n)) for n in (1, 2, 8)
    )
    assert often.flops == 4 * twice.flops == 8 * once.flops
    assert once.peak_bytes < twice.peak_bytes == often.peak_bytes


def test_dropout_keeps_a_byte_a_value_on_a_gpu(folder) -> None:
    def activations(is_gpu: bool) -> int:
        model, adapter = build("llada", "meta", is_lora=True)
        arguments = arguments_for(folder, has_memory=False)
        plan = plan_for(arguments)
        figures = simulate_step(model, adapter, arguments, plan, is_gpu=is_gpu)
        return figures.peak["activations"]

    # Of each layer: the inputs of q, k, v, o, gate and up, and the wider ones of down.
    values = SIZES.num_layers * (6 * SIZES.width + SIZES.mlp_width) * BATCH * LENGTH
    saved = activations(is_gpu=False) - activations(is_gpu=True)
    assert saved == pytest.approx((4 - 1) * values, rel=0.1)  # the backward pass has begun


def test_an_optimizer_that_handles_all_tensors_at_once_needs_room_for_it(folder) -> None:
    arguments = arguments_for(folder, has_memory=False, optim="adamw_torch")
    peaks = []
    for is_gpu in (False, True):
        model, adapter = build("llada", "meta")
        plan = plan_for(arguments, length=8, response=1)
        peaks.append(simulate_step(model, adapter, arguments, plan, is_gpu=is_gpu))
    weights = peaks[0].peak["weights"]
    assert peaks[0].peak_bytes < 4.5 * weights  # weights, gradients, two states
    assert peaks[1].peak_bytes > 4.9 * weights  # and the square roots of one of them


def test_the_plan_leaves_random_state_and_files_alone(folder) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    simulate(arguments_for(folder))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adagrad"}, "training.optim: adagrad cannot be planned"),
        ({"optim": "galore_adamw"}, "training.optim: .*galore_torch"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"offload": True},
            },
            "offload .* cannot be planned",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(folder, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(arguments_for(folder, **changes))


@pytest.mark.parametrize("response", [0, -1, LENGTH + 1])
def test_a_response_must_fit_into_its_row(folder, response) -> None:
    model, _ = build("llada", "meta")
    with pytest.raises(ConfigError, match=f"--response: {response} .* 1 to {LENGTH}"):
        make_plan(model, lambda base: base, arguments_for(folder), LENGTH, response)


REAL = {
    "llada_8b": (LLaDAForMaskedLM, LLaDAConfig(mlp_hidden_size=12288), 8.02, 8.02),
    "llada_moe": (LLaDAMoEForMaskedLM, LLaDAMoEConfig(), 7.36, 1.72),
    "llada2_mini": (LLaDA2ForMaskedLM, LLaDA2Config(), 16.26, 1.43),
    "dream_7b": (DreamForMaskedLM, DreamConfig(), 7.62, 7.62),
}


@pytest.mark.parametrize("name", REAL)
def test_published_shapes_have_the_published_sizes(name) -> None:
    model_class, config, total, active = REAL[name]
    with torch.device("meta"):
        sizes = count_parameters(model_class(config))
    assert sizes.total / 1e9 == pytest.approx(total, abs=0.01)
    assert sizes.active / 1e9 == pytest.approx(active, abs=0.01)
    table = config.vocab_size * config.hidden_size
    assert sizes.active_beyond_table == sizes.active - table


def test_a_real_shape_is_planned_without_its_memory(folder) -> None:
    """LLaDA-MoE at 4096 tokens would take tens of GiB; the plan's process takes none of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    arguments = arguments_for(
        folder,
        memory=MemoryConfig(),
        bf16=True,
        gradient_checkpointing=True,
        per_device_train_batch_size=2,
    )
    config = replace_layers(LLaDAMoEConfig(), 2)
    with torch.device("meta"):
        model: nn.Module = LLaDAMoEForMaskedLM(config).to(torch.bfloat16)
    step = worst_step(2, 4096, 4095, arguments.objective, arguments.memory)
    before = resident_bytes()
    figures = simulate_step(model, frozenset(), arguments, step)
    assert figures.peak_bytes > 10 * 2**30
    assert resident_bytes() - before < 300 * MIB


def replace_layers(config: LLaDAMoEConfig, number: int) -> LLaDAMoEConfig:
    fields = config.to_dict() | {"num_hidden_layers": number, "moe_layer_freq": None}
    return LLaDAMoEConfig(**fields)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_worst_step_masks_the_whole_response(folder) -> None:
    arguments = arguments_for(folder)
    plan = worst_step(2, 10, 7, arguments.objective, arguments.memory)
    assert plan.supervision.positions.shape == (2, 7)
    assert plan.inner is not None
    assert all(len(step.supervision.valid) == 14 for step in plan.inner.steps)
    shared = replace(arguments.memory, sharing="batch")
    assert worst_step(2, 10, 7, arguments.objective, shared).num_rows == 1
