"""4-bit weights on an accelerator; run with `-m gpu` on a machine that has one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.backbones.loading import load_model
from memdlm.backbones.quantization import report

pytestmark = pytest.mark.gpu

# 0.7 B weights, of which 0.6 % are not quantised.
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "mask_token_id": 2047,
    "pad_token_id": 2046,
    "eos_token_id": 2046,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("large")
    with torch.device("cuda"):
        model = LLaDAMoEForMaskedLM(LLaDAMoEConfig(**SIZES)).bfloat16()
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def test_loading_takes_at_most_a_tenth_more_than_four_and_a_half_bits(large: Path) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(large, quantization="nf4", device="cuda")
    told = report(model)
    limit = 1.1 * told.quantized_weights * 4.5 / 8
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert 0.9 * limit / 1.1 < held - told.kept_bytes < limit
    assert peak - told.kept_bytes < limit


def test_a_step_adds_one_dequantised_stack_at_most(large: Path) -> None:
    model = load_model(large, quantization="nf4", device="cuda").requires_grad_(False)
    embeddings = model.get_input_embeddings()(torch.arange(32, device="cuda")[None])
    embeddings = embeddings.detach().requires_grad_()
    for _ in range(2):  # the first run makes the libraries allocate what they keep
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(inputs_embeds=embeddings).logits.float().sum().backward()
        torch.cuda.synchronize()
        added = torch.cuda.max_memory_allocated() - held
    stack = 32 * 1024 * 1024 * 2
    assert added < 1.5 * stack + 2**26


def test_device_and_host_dequantise_to_the_same_weights(
    tmp_path: Path, build_model: Callable[..., DiffusionMaskedLM]
) -> None:
    build_model("llada_moe").bfloat16().save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    logits = []
    for device in ("cpu", "cuda"):
        model = load_model(tmp_path, quantization="nf4", device=device)
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(device)).logits.float().cpu())
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.05


def test_a_model_quantised_on_the_host_moves_to_the_device(
    tmp_path: Path, build_model: Callable[..., DiffusionMaskedLM]
) -> None:
    build_model("llada_moe").bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, quantization="nf4").to("cuda")
    with torch.no_grad():
        assert model(input_ids=torch.arange(12, device="cuda")[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_twenty_steps_reach_the_loss_of_a_bfloat16_base(
    family: str,
    tmp_path: Path,
    rows: list[Any],
    build_model: Callable[..., DiffusionMaskedLM],
    train: Callable[..., Any],
) -> None:
    scale = {"llada": "init_std"}.get(family, "initializer_range")
    build_model(family, **{scale: 0.05}).bfloat16().save_pretrained(tmp_path / "model")
    losses = []
    for kind in ("none", "nf4"):
        model = load_model(tmp_path / "model", quantization=kind, device="cuda")
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        trainer = train(model, max_steps=20, peft_config=lora, use_cpu=False, bf16=True)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
