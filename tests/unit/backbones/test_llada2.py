"""LLaDA2.x: its router, its attention and what of its checkpoints is easily lost."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from memdlm import MemoryConfig
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM, Router
from memdlm.backbones.loading import load_model
from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory.placement import place


def tokens(rows=2, length=20, seed=0):
    return torch.randint(0, 59, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_router(build_model, **overrides) -> Router:
    return build_model("llada2", **overrides).model.layers[1].mlp.gate


@pytest.mark.parametrize(
    ("num_groups", "kept", "top_k"), [(3, 2, 2), (4, 1, 3), (2, 2, 4), (1, 1, 1)]
)
def test_routing_equals_a_plain_loop_over_tokens_and_groups(num_groups, kept, top_k, build_model):
    router = make_router(
        build_model, num_experts=12, n_group=num_groups, topk_group=kept, num_experts_per_tok=top_k
    )
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    chosen, weights = router.choose(router(states))
    size = 12 // num_groups
    has_bias_decided = False
    for token, state in enumerate(states):
        scores = torch.sigmoid(router.weight @ state)
        biased = (scores + router.expert_bias).tolist()
        groups = [biased[g * size : (g + 1) * size] for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: sum(sorted(groups[g])[-2:]), reverse=True)[
            :kept
        ]
        experts = [g * size + e for g in best for e in range(size)]
        expected = sorted(experts, key=lambda e: biased[e], reverse=True)[:top_k]
        assert set(chosen[token].tolist()) == set(expected)
        has_bias_decided |= set(expected) != set(scores.topk(top_k).indices.tolist())
        shares = scores[chosen[token]]
        torch.testing.assert_close(weights[token], 2.5 * shares / shares.sum())
    assert has_bias_decided


def test_the_router_stays_in_fp32_under_autocast(build_model):
    router = make_router(build_model)
    states = torch.randn(5, 32)
    expected = router(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(states), expected)
    assert router.to(torch.bfloat16)(states.bfloat16()).dtype == torch.float32


def test_the_bias_selects_and_takes_no_gradient(build_model):
    model = build_model("llada2")
    assert not any(name.endswith("expert_bias") for name, _ in model.named_parameters())
    before = model(tokens()).logits
    model.model.layers[1].mlp.gate.expert_bias += torch.tensor([9.0, 0, 0, 0, 0, 9.0])
    assert not torch.allclose(model(tokens()).logits, before)
    plain = build_model("llada2", moe_router_enable_expert_bias=False)
    assert not any(name.endswith("expert_bias") for name in plain.state_dict())
    assert plain(tokens()).logits.isfinite().all()


def test_the_selection_bias_is_loaded_exactly_beside_bf16_weights(fixtures, tmp_path):
    folder = shutil.copytree(fixtures / "backbones" / "llada2", tmp_path / "official")
    before = {
        name: tensor if name.endswith("expert_bias") else tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields))
    load_model(folder).save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_block_causal_attention_sees_its_block_and_earlier_ones(build_model):
    model = build_model("llada2", attention="block_causal", block_length=8)
    ids = tokens()
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 59
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 59
    assert not torch.allclose(before[:, 8], model(changed).logits[:, 8])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_block_causal_attention_is_the_prepared_mask_and_joins_padding(implementation, build_model):
    model = build_model("llada2")
    model.set_attn_implementation(implementation)
    ids = tokens()
    block = torch.arange(20) // 8
    visible = (block[:, None] >= block)[None, None].repeat(2, 1, 1, 1)
    full = model(ids).logits
    prepared = model(ids, attention_mask=visible).logits
    assert not torch.allclose(full, prepared)
    model.config.attention, model.config.block_length = "block_causal", 8
    torch.testing.assert_close(model(ids).logits, prepared)
    everything = torch.zeros(2, 1, 20, 20)
    torch.testing.assert_close(model(ids, attention_mask=everything).logits, full)
    padding = (torch.arange(20) < torch.tensor([20, 13])[:, None]).long()
    padded = model(ids, attention_mask=padding).logits
    torch.testing.assert_close(padded[1, :13], model(ids[1:, :13]).logits[0])


def test_the_golden_block_causal_case_holds_by_declaration(fixtures):
    folder = fixtures / "backbones" / "llada2"
    golden = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    model = load_model(folder)
    model.config.attention = "block_causal"
    model.config.block_length = json.loads((folder / "meta.json").read_text())["block_length"]
    logits = model(golden[0]["blockcausal.input_ids"]).logits
    torch.testing.assert_close(logits, golden[1]["blockcausal.logits"], rtol=0, atol=1e-4)


def test_the_kind_of_attention_is_kept_and_a_wrong_one_refused(build_model, tmp_path):
    model = build_model("llada2")
    model.save_pretrained(tmp_path / "full")
    assert {"attention", "block_length"}.isdisjoint(
        json.loads((tmp_path / "full" / "config.json").read_text())
    )
    model.config.attention = "block_causal"
    model.save_pretrained(tmp_path / "blocks")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "blocks")
    assert again.config.attention == "block_causal"
    assert torch.equal(again(tokens(length=40)).logits, model(tokens(length=40)).logits)
    model.config.attention = "causal"
    with pytest.raises(ConfigError, match="'causal' is not one of full, block_causal"):
        model(tokens())
    with pytest.raises(CheckpointError, match="attention='causal' is not supported"):
        LLaDA2Config(attention="causal")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 10, "n_group": 4},
        {"n_group": 2, "topk_group": 3},
        {"num_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
    ],
)
def test_groups_that_cannot_work_are_refused(fields, build_model):
    with pytest.raises(CheckpointError, match=r"correct these fields in config\.json"):
        build_model("llada2", **fields)


def test_a_memory_reaches_routed_and_shared_experts_and_dense_layers(build_model):
    model = build_model("llada2", first_k_dense_replace=3)
    names = [site.name for site in place(model.model, MemoryConfig(layer_fraction=0.5)).sites]
    parts = ("gate_proj", "up_proj", "down_proj")
    assert names == [
        *(f"layers.2.mlp.{part}" for part in parts),
        *(f"layers.3.mlp.experts.{part}" for part in parts),
        *(f"layers.3.mlp.shared_experts.{part}" for part in parts),
    ]


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_shared_experts_are_added_for_every_token(shared, build_model):
    model = build_model("llada2", num_shared_experts=shared)
    block = model.model.layers[1].mlp
    torch.nn.init.zeros_(block.experts.down_proj)
    states = torch.randn(2, 5, 32)
    if shared:
        assert block.shared_experts.up_proj.out_features == 20 * shared
        assert torch.equal(block(states), block.shared_experts(states))
    else:
        assert torch.equal(block(states), torch.zeros_like(states))


def test_adapters_go_on_linear_layers_and_keep_the_fused_projection(build_model, tmp_path):
    model = build_model("llada2")
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".query_key_value.lora_A" in key for key in keys)
    assert not any(".gate.lora" in key for key in keys)
    again = load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    actual = again(tokens()).logits
    assert torch.equal(actual, adapted.eval()(tokens()).logits)
    assert not torch.allclose(actual, expected)


def test_the_class_is_the_official_one():
    assert LLaDA2ForMaskedLM.__name__ == "LLaDA2MoeModelLM"
    assert LLaDA2Config.model_type == "llada2_moe"
