"""Tiny networks: real families, sizes as asked, weights that the seed decides."""

import pytest
import torch

from memdlm.backbones.tiny import (
    TINY_FAMILIES,
    TinySizes,
    build_tiny,
    tiny_config,
)
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError

IDS = {"vocab_size": 50, "mask_token_id": 1, "pad_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(["the cat sat on the mat"])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_tiny_model_predicts_every_token_of_the_tokenizer(family, tokenizer) -> None:
    model = build_tiny(family, tokenizer).eval()
    ids = torch.tensor([[3, 1, 4]])
    logits = model(ids).logits
    assert logits.shape == (1, 3, len(tokenizer))
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.pad_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_seed_alone_decides_the_weights(family, tokenizer) -> None:
    before = torch.random.get_rng_state()
    first = build_tiny(family, tokenizer, seed=3).state_dict()
    torch.rand(5)
    torch.random.set_rng_state(before)
    torch.rand(7)
    same, other = (build_tiny(family, tokenizer, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_the_global_random_state(tokenizer) -> None:
    before = torch.random.get_rng_state()
    build_tiny("llada", tokenizer)
    assert torch.equal(before, torch.random.get_rng_state())


def test_sizes_reach_the_configs() -> None:
    dense_sizes = TinySizes(width=32, num_layers=2, num_heads=2, mlp_width=48)
    dense = tiny_config("llada", dense_sizes, 500.0, **IDS)
    assert (dense.d_model, dense.n_layers, dense.n_heads, dense.mlp_hidden_size) == (32, 2, 2, 48)
    assert dense.rope_theta == dense.rope_parameters["rope_theta"] == 500.0
    few = TinySizes(num_experts=4, num_experts_per_token=1, expert_width=8)
    moe = tiny_config("llada_moe", few, **IDS)
    assert (moe.num_experts, moe.num_experts_per_tok, moe.expert_intermediate_size) == (4, 1, 8)
    assert tiny_config("llada_moe", **IDS).num_experts == 8
    assert tiny_config("llada2", few, **IDS).n_group == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "tiny.sizes.num_layers: 0 is too small"),
        ({"width": 30}, "must give an even whole number"),
        ({"num_experts_per_token": 9}, "exceeds num_experts=8"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TinySizes(**sizes)


def test_an_unknown_family_and_a_tokenizer_without_mask_are_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="'gpt' is not one of llada, llada_moe"):
        build_tiny("gpt", tokenizer)
    maskless = build_word_tokenizer(["a b"])
    maskless.mask_token = None
    with pytest.raises(DataError, match="no mask_token"):
        build_tiny("llada", maskless)
