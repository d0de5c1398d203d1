"""Base weights in 4 bits, whichever family: they load, compute what they hold, and train on top."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from memdlm import MemoryConfig, ObjectiveConfig, ParametricMemory
from memdlm.backbones.adapters import add_lora
from memdlm.backbones.experts import Experts
from memdlm.backbones.loading import load_model
from memdlm.training.outer_step import OuterStep, plan_step
from tests.families import MASK

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="4-bit weights need the `quant` extra: bitsandbytes"
)

MEMORY = MemoryConfig(scope="ffn_attention", rank=3, alpha=6.0, layer_fraction=0.5)


@pytest.fixture
def saved(family, build_model, tmp_path):
    """The folder of a bf16 model, of widths that bitsandbytes packs without a rest."""
    build_model(family).bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def dequantized(model, folder):
    """Return the model of `folder` with the weights that the 4-bit `model` holds."""
    plain = load_model(folder)
    for name, module in plain.named_modules():
        held = model.get_submodule(name)
        if isinstance(module, Experts):
            for stack in ("gate_up_proj", "down_proj"):
                getattr(module, stack).data.copy_(held.dequantized(stack))
        elif hasattr(getattr(held, "weight", None), "quant_state"):
            module.weight.data.copy_(weights_of(held.weight))
    return plain


def weights_of(packed):
    """Dequantise a matrix by hand: two codes a byte, 64 of them share a scale."""
    state, pairs = packed.quant_state, packed.detach().flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().long()
    nested = state.state2
    scales = functional.dequantize_blockwise(
        state.absmax, absmax=nested.absmax, code=nested.code, blocksize=nested.blocksize
    )
    scales = (scales + state.offset).repeat_interleave(64)[: len(codes)]
    return (functional.get_4bit_type("nf4", device="cpu")[codes] * scales).view(state.shape)


def stored(model):
    """Return a copy of everything that must not change."""
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if ".lora_" not in name
    }


def test_what_is_quantised_are_the_linear_layers_and_experts_alone(saved, traits):
    model = load_model(saved, quantization="nf4")
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    linear = {
        name
        for name, module in load_model(saved).model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] not in traits.router
    }
    assert {f"model.{name}.weight" for name in linear} <= packed
    rest = {name for name in packed if name.rpartition(".")[0].removeprefix("model.") not in linear}
    assert all(".mlp.experts." in name for name in rest)
    assert bool(rest) == traits.has_experts
    assert {model.lm_head.weight.dtype, model.model.embed_tokens.weight.dtype} == {torch.bfloat16}


def test_it_computes_with_the_weights_it_holds(saved):
    ids = torch.arange(24).view(2, 12)
    model = load_model(saved, quantization="nf4")
    with torch.no_grad():
        logits = model(ids).logits
        expected = dequantized(model, saved)(ids).logits
        unrounded = load_model(saved)(ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    error = (logits - expected).float().norm() / expected.float().norm()
    assert error < 0.02  # bf16 products in another order
    assert (unrounded - expected).float().norm() / expected.float().norm() > 0.05
    assert cosine_similarity(logits.float().flatten(), unrounded.float().flatten(), dim=0) > 0.6


def test_an_adapter_trains_on_it_with_a_memory_and_no_stored_bit_moves(saved, build_batch):
    from peft import LoraConfig

    model = load_model(saved, quantization="nf4")
    adapted = add_lora(model, LoraConfig(r=2, target_modules="all-linear")).train()
    before = stored(adapted)
    draws = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    plan = plan_step(build_batch(), ObjectiveConfig(), MEMORY, MASK, (0, 4, 0, 0))
    step = OuterStep(adapted, MEMORY)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        result = step.forward(adapted, plan)
        result.loss.backward()
        step.release()
        assert result.inner.alive.all()
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                assert parameter.grad.isfinite().all() and parameter.grad.any(), name
            else:
                assert parameter.grad is None, name
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < losses[0]
    for name, value in stored(adapted).items():
        assert torch.equal(value, before[name]), name


def test_a_memory_on_it_learns_and_leaves_nothing(saved):
    ids = torch.arange(24).view(2, 12)
    model = load_model(saved, quantization="nf4")
    before = stored(model)
    with torch.no_grad():
        plain = model(ids).logits
    memory = ParametricMemory(model, MEMORY)
    stats = memory.write(ids)
    assert stats.alive.all()
    with torch.no_grad():
        with memory.attached():
            assert not torch.equal(model(ids).logits, plain)
        memory.erase()
        assert torch.equal(model(ids).logits, plain)
    for name, value in stored(model).items():
        assert torch.equal(value, before[name]), name
