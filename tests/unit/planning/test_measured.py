"""A plan's peak is the peak of a real run: the real Trainer, every allocation recorded."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PrinterCallback

from benchmarks.speed.measuring import peak_bytes
from memdlm.backbones.adapters import add_lora
from memdlm.backbones.loading import load_model
from memdlm.backbones.quantization import QuantizationConfig, report
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.planning.plan import make_plan
from memdlm.planning.simulation import StepFigures, simulate_step
from memdlm.planning.worst_case import worst_step
from memdlm.training.config import MemDLMConfig
from memdlm.training.trainer import MemDLMTrainer

from .conftest import BATCH, LENGTH, SIZES, arguments_for, build

# What was promised; with -rP every case prints its ratio.
TOLERANCE = 0.15
NF4 = QuantizationConfig("nf4")

# family, LoRA, memory, gradient checkpointing, precision: every value of each with every other of
# at least one neighbour. "amp" is bf16 autocast over fp32 weights, "bf16" over bf16 weights.
CASES = [
    ("llada", False, True, False, "fp32"),
    ("llada", True, True, True, "bf16"),
    ("llada", False, False, False, "bf16"),
    ("llada_moe", True, True, False, "bf16"),
    ("llada_moe", False, False, True, "fp32"),
    ("llada_moe", False, True, False, "amp"),
    ("llada2", False, True, True, "amp"),
    ("llada2", True, False, False, "fp32"),
    ("dream", True, True, True, "fp32"),
    ("dream", False, False, False, "amp"),
]
ALL_CASES = list(
    itertools.product(
        TINY_FAMILIES, (False, True), (False, True), (False, True), ("fp32", "bf16", "amp")
    )
)


def settings(folder: Path, has_memory: bool, checkpointing: bool, precision: str, **changes: Any):
    return arguments_for(
        folder,
        has_memory,
        gradient_checkpointing=checkpointing,
        bf16=precision != "fp32",
        **changes,
    )


def simulate(
    arguments: MemDLMConfig,
    family: str,
    is_lora: bool,
    precision: str,
    sizes: TinySizes = SIZES,
    is_gpu: bool = False,
) -> StepFigures:
    model, adapter = build(family, "meta", dtype_of(precision), is_lora, sizes)
    length = sizes.context_length
    step = worst_step(BATCH, length, length - 1, arguments.objective, arguments.memory)
    return simulate_step(model, adapter, arguments, step, is_gpu=is_gpu)


def measure(
    arguments: MemDLMConfig,
    family: str,
    is_lora: bool,
    precision: str,
    sizes: TinySizes = SIZES,
    device: str = "cpu",
) -> int:
    """Return the most bytes that tensors hold while the real Trainer takes two steps."""
    model, _ = build(family, device, dtype_of(precision), is_lora, sizes)
    return measure_training(model, arguments, sizes.context_length, device)


def measure_training(
    model: nn.Module, arguments: MemDLMConfig, length: int, device: str = "cpu", held: int = 0
) -> int:
    """Do the same with a model at hand; `held` bytes of it are neither parameters nor buffers."""
    held += sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    row = {"input_ids": [1] * length, "labels": [-100] + [1] * (length - 1)}
    num_rows = BATCH * arguments.gradient_accumulation_steps * arguments.max_steps
    trainer = MemDLMTrainer(model, arguments, train_dataset=[row] * num_rows)
    trainer.remove_callback(PrinterCallback)
    gc.collect()  # what earlier tests left behind must not be released, and counted, meanwhile
    return held + peak_bytes(trainer.train, torch.device(device))


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check(folder: Path, family: str, is_lora: bool, precision: str, **changes: Any) -> None:
    arguments = settings(folder, precision=precision, **changes)
    planned = simulate(arguments, family, is_lora, precision).peak_bytes
    arguments = settings(folder, precision=precision, **changes)
    measured = measure(arguments, family, is_lora, precision)
    assert measured > 15 * 2**20  # dominated by tensors, not by odds and ends
    print(f"planned {planned:,}, measured {measured:,} bytes: ratio {planned / measured:.4f}")
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("family", "is_lora", "has_memory", "checkpointing", "precision"), CASES)
def test_the_planned_peak_is_the_measured_one(
    folder, family, is_lora, has_memory, checkpointing, precision
):
    check(folder, family, is_lora, precision, has_memory=has_memory, checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "is_lora", "has_memory", "checkpointing", "precision"), ALL_CASES
)
def test_the_planned_peak_is_the_measured_one_everywhere(
    folder, family, is_lora, has_memory, checkpointing, precision
):
    check(folder, family, is_lora, precision, has_memory=has_memory, checkpointing=checkpointing)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"objective": ObjectiveConfig(time_epsilon=0.99999, padding="excluded")},
        {"objective": ObjectiveConfig(time_epsilon=0.99999, logits_budget=1)},
        {"optim": "sgd"},
        {"optim": "adamw_torch"},
        {"optim": "adamw_bnb_8bit"},
    ],
    ids=[
        "accumulation",
        "attention mask",
        "logits in chunks",
        "sgd",
        "AdamW tensor by tensor",
        "8 bits",
    ],
)
def test_other_settings_are_followed_too(folder, changes):
    if "bnb" in changes.get("optim", ""):
        pytest.importorskip("bitsandbytes")
    check(folder, "dream", False, "fp32", has_memory=False, checkpointing=False, **changes)


@pytest.mark.parametrize("family", ["llada_moe", "dream"])
def test_four_bits_take_what_was_planned(folder, family):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    def wrap(base: nn.Module) -> nn.Module:
        return add_lora(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

    changes = {"bf16": True, "gradient_checkpointing": True}
    outline, _ = build(family, "meta", torch.bfloat16)
    plan = make_plan(outline, wrap, arguments_for(folder, **changes), LENGTH, quantization=NF4)
    build(family, "cpu", torch.bfloat16)[0].save_pretrained(folder / "model")
    base = load_model(folder / "model", quantization=NF4)
    stored = report(base)
    weights = plan.step.largest["weights"]
    others = sum(buffer.nbytes for buffer in base.buffers())
    assert weights == stored.quantized_bytes + stored.kept_bytes + others
    assert plan.sizes.total == stored.total_weights
    in_states = weights - sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    arguments = arguments_for(folder, **changes)
    measured = measure_training(wrap(base), arguments, LENGTH, held=in_states)
    print(f"ratio {plan.step.peak_bytes / measured:.4f}")
    assert plan.step.peak_bytes == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("is_lora", [False, True])
def test_the_planned_peak_is_that_of_a_gpu(folder, family, is_lora):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # Large enough that the smallest block of the caching allocator does not matter.
    sizes = TinySizes(
        width=512, num_heads=8, mlp_width=1536, context_length=LENGTH * 4, expert_width=256
    )
    arguments = settings(folder, True, False, "bf16")
    planned = simulate(arguments, family, is_lora, "bf16", sizes, is_gpu=True).peak_bytes
    arguments = settings(folder, True, False, "bf16", use_cpu=False)
    measured = measure(arguments, family, is_lora, "bf16", sizes, "cuda")
    print(f"planned {planned:,}, measured {measured:,} bytes: ratio {planned / measured:.4f}")
    assert planned == pytest.approx(measured, rel=TOLERANCE)
