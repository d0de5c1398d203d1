"""Norm, rotary embedding and gate: official numbers to the bit, and close to them in free order."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.operation_order import free_order, is_order_free, official_order
from memdlm.backbones.rms_norm import RMSNorm
from memdlm.backbones.rotary import rotate

WIDTH, LENGTH = 24, 10
MODES = {"gradients": nullcontext, "official": torch.no_grad, "free": torch.no_grad}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def compare(mode, dtype, found, expected):
    """Require the same bits, but where sums may be reordered."""
    if mode == "free" and dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.fixture(params=MODES)
def mode(request):
    with MODES[request.param](), free_order() if request.param == "free" else nullcontext():
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(mode, dtype):
    ours, official = RMSNorm(WIDTH, 1e-5).to(dtype), LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype)
    weight = draw(WIDTH, dtype=dtype)
    ours.load_state_dict({"weight": weight})
    official.load_state_dict({"weight": weight})
    hidden = 3 * draw(2, LENGTH, WIDTH, dtype=dtype)
    before = hidden.clone()
    found, expected = ours(hidden), official(hidden)
    if mode == "free":  # in half precision too the mean of squares is one of float32 values
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)
    assert torch.equal(hidden, before) and torch.equal(ours.weight, weight)


@torch.no_grad()
def test_norm_of_zeros_and_of_large_states():
    norm = RMSNorm(WIDTH, 1e-5)
    hidden = torch.stack([torch.zeros(WIDTH), torch.full((WIDTH,), 1e15)])
    expected = torch.stack([torch.zeros(WIDTH), torch.ones(WIDTH)])
    for order in (nullcontext, free_order):
        with order():
            torch.testing.assert_close(norm(hidden), expected)


@pytest.mark.parametrize("rotary_width", [WIDTH, WIDTH // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_embedding(mode, dtype, rotary_width, rows):
    # As a projection leaves them: heads beside each other, not one after the other.
    heads = draw(2, LENGTH, 3, WIDTH, dtype=dtype).transpose(1, 2)
    angles = draw(rows, LENGTH, rotary_width // 2).repeat(1, 1, 2)
    embeddings = angles.cos().to(dtype), angles.sin().to(dtype)
    before = heads.clone()
    expected, _ = apply_rotary_pos_emb(heads, heads, *embeddings)
    compare(mode, dtype, rotate(heads, embeddings), expected)
    assert torch.equal(heads, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(mode, dtype):
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=40, mlp_bias=False, hidden_act="silu"
    )
    ours, official = GatedMLP(WIDTH, 40, "silu").to(dtype), LlamaMLP(config).to(dtype)
    official.load_state_dict(ours.state_dict())
    hidden = draw(2, LENGTH, WIDTH, dtype=dtype)
    assert torch.equal(ours(hidden), official(hidden))


@torch.no_grad()
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_what_a_hook_has_kept_stays(part):
    """Neurons are what people look at: nothing may be written over what a module returned."""
    mlp, hidden = GatedMLP(WIDTH, 40, "silu"), draw(2, LENGTH, WIDTH)
    kept, copies = [], []

    def keep(module, args, output):
        kept.append(output)
        copies.append(output.clone())

    getattr(mlp, part).register_forward_hook(keep)
    mlp(hidden)
    assert torch.equal(kept[0], copies[0])


@torch.no_grad()
def test_an_activation_that_returns_its_input_leaves_the_gate():
    mlp, hidden = GatedMLP(WIDTH, 40, "linear"), draw(2, LENGTH, WIDTH)
    kept = []
    mlp.gate_proj.register_forward_hook(lambda module, args, output: kept.append(output))
    found = mlp(hidden)
    assert torch.equal(kept[0], mlp.gate_proj(hidden))
    assert torch.equal(found, mlp.down_proj(mlp.gate_proj(hidden) * mlp.up_proj(hidden)))


def test_the_order_is_free_without_gradients_only_and_ends():
    assert not is_order_free()
    with free_order():
        assert not is_order_free()
        with torch.no_grad():
            assert is_order_free()
            with official_order():
                assert not is_order_free()
            assert is_order_free()
    with torch.no_grad():
        assert not is_order_free()
