"""What a memory may do to a model, and what it must leave as it was."""

import pytest
import torch
from peft import get_peft_model

from memdlm import MemoryConfig, ObjectiveConfig, ParametricMemory
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import place

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}


def prompt(lengths=(14, 9, 5), seed=0):
    """Return right-padded ids [B, L] and their attention mask."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), 59)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(0, 59, (length,), generator=draws)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def snapshot(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "mode": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        "keys": list(model.state_dict()),
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name]), name
    for name, grad in before["grads"].items():
        assert (grad is None and after["grads"][name] is None) or torch.equal(
            grad, after["grads"][name]
        ), name
    for part in ("trainable", "mode", "hooks", "keys"):
        assert before[part] == after[part], part
    assert torch.equal(before["rng"], after["rng"])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_0_changes_no_bit(family, kind, num_rows, dtype, build_model):
    model = build_model(family).to(dtype)
    config = MemoryConfig(kind=kind, scope="ffn_attention", **SMALL)
    fast = FastWeights(
        place(model.model, config), config, num_rows, torch.device("cpu"), torch.Generator()
    )
    ids, mask = prompt()
    before = model(ids, attention_mask=mask).logits
    with fast.attached(model.model):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_initial_fast_weights_are_as_described(family, build_model):
    model = build_model(family)
    config = MemoryConfig(rank=64, layer_fraction=0.5)
    fast = FastWeights(
        place(model.model, config), config, 2, torch.device("cpu"), torch.Generator()
    )
    for site in fast.placement.sites:
        a, b = fast.tensors[f"{site.name}.A"], fast.tensors[f"{site.name}.B"]
        assert (b == 0).all()
        bound = site.in_features**-0.5
        assert a.abs().max() <= bound and a.abs().max() > 0.95 * bound
        assert torch.equal(a[0], a[1])  # a row's memory cannot depend on its place in the batch
        if site.num_experts:
            assert not torch.equal(a[0, 0], a[0, 1])
    assert fast.scale == config.alpha / 64


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("sharing", ["sequence", "batch"])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_write_attach_erase_leave_the_model_as_it_was(family, kind, sharing, loss, build_model):
    model = build_model(family).train()
    model.model.layers[1].eval()  # a mixed mode must come back as it was, module by module
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    ids, mask = prompt()
    plain = model(ids, attention_mask=mask).logits.detach()
    before = snapshot(model)
    memory = ParametricMemory(model, MemoryConfig(kind=kind, sharing=sharing, loss=loss, **SMALL))
    memory.write(ids, mask)
    assert memory.is_written
    assert_same(before, snapshot(model))
    with memory.attached():
        assert list(model.state_dict()) == before["keys"]
        attached = model(ids, attention_mask=mask).logits
    assert not torch.equal(attached, plain)
    assert_same(before, snapshot(model))
    memory.erase()
    assert not memory.is_written
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert_same(before, snapshot(model))


def test_the_mode_comes_back_even_when_writing_fails(build_model):
    model = build_model("llada").train()
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    before = snapshot(model)
    with pytest.raises(IndexError):
        memory.write(torch.full((1, 4), 10_000))
    assert_same(before, snapshot(model))
    assert not memory.is_written


def test_a_backward_with_the_memory_attached_leaves_no_gradient_on_it(family, build_model):
    model = build_model(family)
    ids, mask = prompt()
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    memory.write(ids, mask)
    with memory.attached():
        model(ids, attention_mask=mask).logits.square().mean().backward()
    for tensor in memory.fast_weights.tensors.values():
        assert tensor.grad is None and not tensor.requires_grad
    assert model.lm_head.weight.grad is not None


def test_writing_learns_the_prompt(family, build_model):
    model = build_model(family)
    ids, mask = prompt()
    config = MemoryConfig(**SMALL, num_epochs=8, learning_rate=0.2)
    stats = ParametricMemory(model, config).write(ids, mask)
    assert stats.losses.shape == (16, 3)
    assert (stats.losses[-1] < stats.losses[1]).all()
    assert stats.alive.all()


@pytest.mark.parametrize("scope", ["ffn", "ffn_attention"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(family, scope, kind, build_model):
    model = build_model(family)
    lengths = (14, 9, 5)
    ids, mask = prompt(lengths)
    config = MemoryConfig(kind=kind, scope=scope, **SMALL, num_steps=3)
    together = ParametricMemory(model, config)
    together.write(ids, mask)
    with together.attached():
        logits = model(ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = ParametricMemory(model, config)
        alone.write(ids[row, None, :length])
        for name, tensor in alone.fast_weights.tensors.items():
            torch.testing.assert_close(
                together.fast_weights.tensors[name][row], tensor[0], rtol=0, atol=1e-6
            )
        torch.testing.assert_close(
            together.stats.losses[:, row], alone.stats.losses[:, 0], rtol=1e-6, atol=0
        )
        with alone.attached():
            expected = model(ids[row, None, :length]).logits[0]
        torch.testing.assert_close(logits[row, :length], expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_a_row_never_visits_keeps_that_rows_phi_0(build_model):
    model = build_model("llada_moe")
    ids, mask = prompt((4, 14))
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    memory.write(ids, mask)
    # Not the last layer, which runs at scored positions only: all tokens are routed.
    b = memory.fast_weights.tensors["layers.2.mlp.experts.up_proj.B"]  # [b, E, out, r]
    is_zero = (b == 0).all(dim=-1).all(dim=-1)
    assert is_zero[0].sum() > is_zero[1].sum()
    assert not is_zero.all(dim=1).any()


def test_the_seed_decides_and_rows_do_not_depend_on_their_order(build_model):
    model = build_model("llada")
    ids, _ = prompt((8, 8, 8))

    def written(ids, seed):
        memory = ParametricMemory(model, MemoryConfig(**SMALL))
        memory.write(ids, seed=seed)
        return memory.fast_weights.tensors["layers.3.mlp.up_proj.B"]

    first = written(ids, 0)
    assert torch.equal(first, written(ids, 0))
    assert not torch.equal(first, written(ids, 1))
    torch.testing.assert_close(first.flip(0), written(ids.flip(0), 0), rtol=0, atol=1e-6)


def test_writing_again_replaces_what_was_there(build_model):
    model = build_model("llada")
    ids, _ = prompt((8,))
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    memory.write(ids)
    first = memory.fast_weights.tensors["layers.3.mlp.up_proj.B"]
    memory.write(ids.flip(1))
    memory.write(ids)
    assert torch.equal(memory.fast_weights.tensors["layers.3.mlp.up_proj.B"], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_weights_stay_fp32_whatever_the_models_dtype(family, dtype, build_model):
    model = build_model(family).to(dtype)
    ids, mask = prompt()
    memory = ParametricMemory(model, MemoryConfig(scope="ffn_attention", **SMALL))
    stats = memory.write(ids, mask)
    assert stats.alive.all()
    assert all(tensor.dtype == torch.float32 for tensor in memory.fast_weights.tensors.values())
    with memory.attached():
        assert model(ids, attention_mask=mask).logits.dtype == dtype
    # and they stay near those of the fp32 model
    exact = ParametricMemory(build_model(family), MemoryConfig(scope="ffn_attention", **SMALL))
    exact.write(ids, mask)
    torch.testing.assert_close(stats.losses, exact.stats.losses, rtol=0.1, atol=0)


def test_write_under_a_peft_lora_adapts_beside_the_adapter(family, build_model, build_lora):
    lora = build_lora(r=2, lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(build_model(family), lora)
    model.train()
    ids, mask = prompt()
    before = snapshot(model)
    config = MemoryConfig(scope="ffn_attention", **SMALL)
    memory = ParametricMemory(model, config)
    memory.write(ids, mask)
    assert_same(before, snapshot(model))
    again = ParametricMemory(model, config)
    again.write(ids, mask)  # in eval mode, so no dropout: the same memory again
    for name, tensor in memory.fast_weights.tensors.items():
        assert torch.equal(tensor, again.fast_weights.tensors[name])
    # merging the adapter into the base gives the same memory: the delta is added beside it
    merged = ParametricMemory(model.merge_and_unload(), config)
    merged.write(ids, mask)
    for name, tensor in memory.fast_weights.tensors.items():
        torch.testing.assert_close(tensor, merged.fast_weights.tensors[name], rtol=1e-4, atol=1e-5)


def test_one_memory_of_several_rows_refuses_another_batch_size(family, build_model):
    model = build_model(family)
    ids, mask = prompt()
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    memory.write(ids, mask)
    for rows in (1, 6):
        other = ids[:1].repeat(rows, 3)
        with memory.attached(), pytest.raises(UsageError, match=f"3 rows.*{rows}"):
            model(other)
    shared = ParametricMemory(model, MemoryConfig(sharing="batch", **SMALL))
    shared.write(ids, mask)
    with shared.attached():
        model(ids[:1].repeat(6, 1))
    assert snapshot(model)["hooks"] == 0


def test_the_schedule_of_the_objective_draws_the_anchor(build_model):
    model = build_model("llada")
    ids, _ = prompt((14,))

    def first_loss(schedule):
        objective = ObjectiveConfig(schedule=schedule)
        memory = ParametricMemory(model, MemoryConfig(prompt_mask_ratio=0.4, **SMALL), objective)
        return memory.write(ids).losses[0, 0]

    assert first_loss("linear") != first_loss("cosine")


def test_bad_use_is_told_in_one_line(build_model):
    model = build_model("llada")
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    with pytest.raises(UsageError, match="call write"), memory.attached():
        pass
    with pytest.raises(ConfigError, match=r"memory\.enabled"):
        ParametricMemory(model, MemoryConfig(enabled=False))
    with pytest.raises(DataError, match="empty prompt"):
        memory.write(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(DataError, match="empty prompt"):
        memory.write(torch.zeros(1, 0, dtype=torch.int64))
    for ids in ([[1, 2]], torch.zeros(3), torch.zeros(1, 3), torch.zeros(0, 3).long()):
        with pytest.raises(UsageError, match="give int64 tokens"):
            memory.write(ids)
    with pytest.raises(UsageError, match=r"attention_mask \[1, 2\] differs from .* \[1, 3\]"):
        memory.write(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2))
    model.config.mask_token_id = None
    with pytest.raises(DataError, match="mask_token_id"):
        memory.write(torch.zeros(1, 3, dtype=torch.int64))


def test_one_memory_at_a_time(family, build_model):
    model = build_model(family)
    ids, mask = prompt()
    first, second = (ParametricMemory(model, MemoryConfig(**SMALL)) for _ in range(2))
    first.write(ids, mask)
    second.write(ids, mask, seed=1)
    before = model(ids, attention_mask=mask).logits
    with first.attached():
        within = model(ids, attention_mask=mask).logits
        for memory in (first, second):
            with pytest.raises(UsageError, match="before you attach"), memory.attached():
                pass
            with pytest.raises(UsageError, match="before you write"):
                memory.write(ids, mask)
        assert torch.equal(model(ids, attention_mask=mask).logits, within)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    with second.attached():
        assert not torch.equal(model(ids, attention_mask=mask).logits, within)


def test_writing_inside_inference_mode_works(build_model):
    model = build_model("llada")
    ids, _ = prompt((9,))
    outside = ParametricMemory(model, MemoryConfig(**SMALL))
    outside.write(ids)
    inside = ParametricMemory(model, MemoryConfig(**SMALL))
    with torch.inference_mode():
        inside.write(ids)
    for name, tensor in outside.fast_weights.tensors.items():
        assert torch.equal(tensor, inside.fast_weights.tensors[name])
