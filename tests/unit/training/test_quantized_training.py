"""Training on a 4-bit base: as good as on a bfloat16 one, with LoRA and memory on top."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from memdlm import MemoryConfig
from memdlm.backbones.adapters import add_lora
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.backbones.quantization import is_quantized
from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.states import CleanBatch
from memdlm.errors import ConfigError
from memdlm.training.outer_step import OuterStep, StepPlan

Build = Callable[..., DiffusionMaskedLM]
Train = Callable[..., Any]


SIZES = ("initializer_range", "num_hidden_layers")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture
def checkpoint(tmp_path: Path, build_model: Build) -> Path:
    """A bfloat16 checkpoint with experts."""
    build_model("llada_moe").bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_twenty_steps_reach_the_loss_of_a_bfloat16_base(
    family: str, tmp_path: Path, rows: list[Any], build_model: Build, train: Train
) -> None:
    names = ("init_std", "n_layers") if family == "llada" else SIZES
    start = build_model(family, **dict(zip(names, (0.05, 2), strict=True)))
    # Weights that have learned something, so that the loss depends on them.
    train(start, max_steps=80, learning_rate=5e-3, memory=MemoryConfig(enabled=False))
    start.bfloat16().save_pretrained(tmp_path / "model")
    losses = {}
    for kind in ("none", "nf4"):
        model = load_model(tmp_path / "model", quantization=kind)
        assert is_quantized(model) == (kind == "nf4")
        trainer = train(model, max_steps=20, learning_rate=1e-3, peft_config=lora())
        assert min(logged(trainer, "fast_delta_norm")) > 0  # memories are written
        last = logged(trainer, "loss")[-5:]
        losses[kind] = torch.tensor([sum(last) / 5, trainer.evaluate(rows)["eval_loss"]])
    assert losses["none"][1] < 3.5  # far from the 4.1 of an even guess
    torch.testing.assert_close(losses["nf4"], losses["none"], rtol=0.02, atol=0)


def test_the_four_bits_stay_as_they_are_while_the_adapter_trains(
    family: str, tmp_path: Path, build_model: Build, train: Train
) -> None:
    build_model(family).bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, quantization="nf4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(model, peft_config=lora(), max_steps=2)
    after = unwrap(trainer.model).state_dict()
    after = {name.replace("base_layer.", ""): tensor for name, tensor in after.items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    moved = [bool(p.any()) for name, p in trained.items() if "lora_B" in name]
    assert sum(moved) > 0.9 * len(moved)  # an expert without a token stays


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "bf16": True}])
def test_a_resumed_run_is_the_run(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], train: Train
) -> None:
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = train(load_model(checkpoint, quantization="nf4"), peft_config=lora(), **settings)
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-2", folder)
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    fresh = load_model(checkpoint, quantization="nf4")
    resumed = train(fresh, resume=str(folder), peft_config=lora(), **settings)
    assert logged(resumed, "loss") == logged(whole, "loss")
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_step_on_four_bits_never_waits_for_the_device(
    family: str,
    tmp_path: Path,
    build_model: Build,
    build_batch: Callable[..., CleanBatch],
    lay_out: Callable[..., StepPlan],
    no_host_sync: Any,
) -> None:
    build_model(family).bfloat16().save_pretrained(tmp_path)
    model = add_lora(load_model(tmp_path, quantization="nf4"), lora())
    memory = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.5, scope="ffn_attention")
    plan = lay_out(build_batch(), memory)
    step = OuterStep(model, memory)
    with no_host_sync:
        step.forward(model, plan).loss.backward()
        step.release()
    assert no_host_sync.num_operators > 500


def test_fast_weights_find_the_same_sites(checkpoint: Path, train: Train) -> None:
    scope = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.5, scope="ffn_attention")
    sites = []
    for kind in ("none", "nf4"):
        model = load_model(checkpoint, quantization=kind)
        trainer = train(model, peft_config=lora(), memory=scope, max_steps=1)
        sites.append([site.name for site in trainer.outer_step.placement.sites])
        assert logged(trainer, "dropped_memories") == [0]
    assert sites[0] == sites[1]


def test_without_an_adapter_it_is_refused(checkpoint: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match="4-bit and cannot be trained: give an adapter"):
        train(load_model(checkpoint, quantization="nf4"))


def test_half_precision_is_refused(checkpoint: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match="fp16: 4-bit weights compute in bfloat16"):
        train(load_model(checkpoint, quantization="nf4"), peft_config=lora(), fp16=True)
