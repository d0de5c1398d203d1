"""Attention is transformers' to the bit; at some positions it is that of everywhere, for less."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from memdlm.backbones.kv_cache import KVCache
from memdlm.backbones.layer_inputs import gather_positions

LENGTH = 12
POSITIONS = torch.tensor([[3, 11, 0], [7, 7, 2]])
PADDED = torch.ones(2, LENGTH).index_fill(1, torch.tensor([9, 10, 11]), 0)
PADDED[0] = 1
CAUSAL = torch.ones(2, 1, LENGTH, LENGTH).tril().bool()
MASKS = {"none": None, "padding": PADDED, "causal": CAUSAL, "additive": (1 - CAUSAL.float()) * -1e9}


# Whose attention in transformers each is. LLaDA2's one projection has no counterpart there; its
# golden outputs stand for it.
OFFICIAL = {"llada": LlamaAttention, "llada_moe": Glm4MoeAttention, "dream": Qwen2Attention}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("mask", [None, "causal"])
def test_it_gives_what_transformers_attention_gives(name, mask, dtype, build_model):
    model = build_model(name).to(dtype).eval()
    layer, hidden, inputs = last_layer(model, None if mask is None else MASKS[mask])
    config = copy(model.config)
    config.attention_bias = False
    config.use_qk_norm = True
    config.layer_types = ["full_attention"] * 4
    official = OFFICIAL[name](config, 3).to(dtype).eval()
    official.load_state_dict(layer.self_attn.state_dict())
    official.is_causal = False
    expected, _ = official(hidden, inputs.position_embeddings, inputs.attention_mask)
    assert torch.equal(layer.self_attn(hidden, inputs), expected)


def test_a_hook_on_attention_sees_every_layer(family, build_model):
    model, seen = build_model(family).eval(), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: seen.append(module.layer_idx))
    model(torch.randint(0, 59, (2, LENGTH)), positions=POSITIONS)
    assert seen == [0, 1, 2, 3]


def last_layer(model, mask=None):
    """Return the last layer and what goes into it."""
    ids = torch.randint(0, 59, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden, inputs = model.model.embed(ids, mask)
    return model.model.layers[-1], hidden, inputs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_gives_what_attention_everywhere_gives(family, mask, implementation, build_model):
    model = build_model(family).eval()
    model.set_attn_implementation(implementation)
    layer, hidden, inputs = last_layer(model, MASKS[mask])
    expected = gather_positions(layer.self_attn(hidden, inputs), POSITIONS)
    found = layer.self_attn(hidden, inputs, POSITIONS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_receives_the_keys_of_all_tokens(family, build_model):
    layer, hidden, inputs = last_layer(build_model(family).eval())
    caches = [KVCache(LENGTH), KVCache(LENGTH)]
    for cache in caches:
        cache.open(torch.arange(LENGTH).expand(2, -1), LENGTH)
    layer.self_attn(hidden, replace(inputs, cache=caches[0]))
    layer.self_attn(hidden, replace(inputs, cache=caches[1]), POSITIONS)
    for one, other in zip(*(cache._stores[3] for cache in caches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_attention_everywhere(family, build_model):
    layer, hidden, inputs = last_layer(build_model(family).train())
    gradients = []
    for narrow in (False, True):
        layer.zero_grad()
        hidden = hidden.detach().requires_grad_()
        result = layer.self_attn(hidden, inputs, POSITIONS if narrow else None)
        result = result if narrow else gather_positions(result, POSITIONS)
        result.square().sum().backward()
        own = [p.grad for p in layer.self_attn.parameters() if p.grad is not None]
        gradients.append([hidden.grad, *own])
    assert len(gradients[0]) == len(gradients[1]) > 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_multiplies_less(family, build_model):
    layer, hidden, inputs = last_layer(build_model(family).eval())
    counts = []
    for narrow in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.self_attn(hidden, inputs, POSITIONS if narrow else None)
        counts.append(counter.get_total_flops())
    # 3 of 12 positions ask: a fused projection of queries, keys and values stays whole.
    assert counts[1] < 0.85 * counts[0]
