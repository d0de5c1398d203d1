"""Outer LoRA on every linear layer, routed experts included, whichever family."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from memdlm import MemoryConfig, ObjectiveConfig, ParametricMemory
from memdlm.backbones.adapters import add_lora
from memdlm.backbones.experts import Experts
from memdlm.backbones.loading import load_model
from memdlm.training.outer_step import OuterStep, plan_step
from tests.families import FEED_FORWARD, MASK

MEMORY = MemoryConfig(scope="ffn_attention", rank=3, alpha=6.0, layer_fraction=0.5)


def adapt(model, is_drawn=True, **settings):
    """Put an adapter on all linear layers, away from its start, where it has no effect."""
    adapted = add_lora(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    draws = torch.Generator().manual_seed(0)
    if is_drawn:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
    return adapted


def prompt(lengths=(11, 7)):
    ids = torch.arange(2 * max(lengths)).view(2, -1)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def test_it_reaches_every_linear_layer_but_the_head_and_changes_nothing_at_first(
    family, traits, build_model
):
    model = build_model(family).eval()
    ids, mask = prompt()
    expected = model(ids, attention_mask=mask).logits
    wanted = set()
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            assert name.split(".")[-1] in traits.linear, name
            wanted.add(name)
        elif isinstance(module, Experts):
            wanted |= {f"{name}.{part}" for part in FEED_FORWARD}
    adapted = adapt(model, is_drawn=False).eval()
    found = {"A": set(), "B": set()}
    for name, parameter in adapted.named_parameters():
        if ".lora_" not in name:
            assert not parameter.requires_grad, name
            continue
        path, _, rest = name.removeprefix("base_model.model.model.").partition(".lora_")
        factor, _, part = rest.split(".")
        found[factor].add(path if part == "weight" else f"{path}.{part}")
    assert found["A"] == found["B"] == wanted
    assert torch.equal(adapted(ids, attention_mask=mask).logits, expected)


def test_saved_as_published_and_loaded_it_is_the_same(family, traits, build_model, tmp_path):
    model = build_model(family).eval()
    model.save_pretrained(tmp_path / "base")
    ids, mask = prompt()
    plain = model(ids, attention_mask=mask).logits
    adapted = adapt(model).eval()
    expected = adapted(ids, attention_mask=mask).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dim() for tensor in saved.values()} == {2}
    assert saved.keys() == {
        f"base_model.model.{name}.lora_{factor}.weight"
        for name in official_linear_layers(tmp_path / "base", traits)
        for factor in "AB"
    }
    loaded = load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)


def official_linear_layers(folder, traits):
    """Return the names of what is a linear layer in the official code, but the head."""
    others = ("model.transformer.wte.", "model.transformer.ff_out.", "lm_head.")
    others += ("model.embed_tokens.", "model.word_embeddings.")
    if not traits.router:  # LLaDA2's is a bare matrix
        others += tuple(f"model.layers.{index}.mlp.gate." for index in range(4))
    return {
        name.removesuffix(".weight")
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.dim() == 2 and not name.startswith(others)
    }


def test_merged_it_is_a_plain_model_of_the_family(family, build_model, tmp_path):
    model = build_model(family).double().eval()
    keys = list(model.state_dict())
    ids, mask = prompt()
    adapted = adapt(model).double().eval()
    expected = adapted(ids, attention_mask=mask).logits
    merged = adapted.merge_and_unload()
    assert list(merged.state_dict()) == keys
    torch.testing.assert_close(merged(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    merged.float().save_pretrained(tmp_path)
    again = load_model(tmp_path)(ids, attention_mask=mask).logits
    torch.testing.assert_close(again, expected.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_step_with_a_memory_trains_the_adapter_alone(
    family, is_checkpointed, build_model, build_batch
):
    adapted = adapt(build_model(family)).train()
    if is_checkpointed:
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    plan = plan_step(build_batch(), ObjectiveConfig(), MEMORY, MASK, (0, 4, 0, 0))
    step = OuterStep(adapted, MEMORY)
    result = step.forward(adapted, plan)
    result.loss.backward()
    step.release()
    assert result.inner.alive.all()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_a_memory_beside_it_is_the_memory_of_the_merged_model(family, build_model):
    adapted = adapt(build_model(family).double()).double().eval()
    ids, mask = prompt()
    with torch.no_grad():
        plain = adapted(ids, attention_mask=mask).logits
    beside = ParametricMemory(adapted, MEMORY)
    beside.write(ids, mask)
    with torch.no_grad():
        with beside.attached():
            assert not torch.allclose(adapted(ids, attention_mask=mask).logits, plain)
        beside.erase()
        assert torch.equal(adapted(ids, attention_mask=mask).logits, plain)
    beside.write(ids, mask)
    merged = ParametricMemory(adapted.merge_and_unload(), MEMORY)
    merged.write(ids, mask)
    for name, tensor in beside.fast_weights.tensors.items():
        torch.testing.assert_close(tensor, merged.fast_weights.tensors[name], rtol=1e-4, atol=1e-5)
