"""The trainer against loops written by hand, on real models, adapters and optimisers."""

import pytest
import torch
from torch.nn import functional as F

from memdlm import MemoryConfig, ObjectiveConfig
from memdlm.backbones.experts import Experts
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.memory.fast_weights import FastWeights
from memdlm.training.outer_step import plan_step

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
OFF = MemoryConfig(enabled=False)


def losses_of(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def plain_loss(model, batch, step, micro_batch=0, everywhere=False):
    """Standard MDLM written out: mask, run, cross-entropy, 1/t, divide by all maskable tokens."""
    plan = plan_step(batch, ObjectiveConfig(), OFF, 60, (3, step, micro_batch, 0))
    masked = plan.noisy != batch.clean
    labels = batch.clean[masked]
    if everywhere:
        logits = model(plan.noisy).logits[masked]
    else:
        positions, valid = plan.supervision.positions, plan.supervision.valid
        logits = model(plan.noisy, positions=positions, valid=valid).logits
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * plan.supervision.coefficients).sum()


@pytest.mark.parametrize("everywhere", [False, True])
def test_memory_off_equals_a_plain_mdlm_loop(family, everywhere, build_model, train):
    trainer = train(build_model(family), memory=OFF)
    model = build_model(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(trainer.batches[:4]):
        optimizer.param_groups[0]["lr"] = 3e-3 * (4 - step) / 4
        loss = plain_loss(model, batch, step, everywhere=everywhere)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if everywhere:  # products of other shapes, so the last bits differ
        torch.testing.assert_close(losses, losses_of(trainer), rtol=1e-5, atol=0)
        return
    assert losses == losses_of(trainer)
    assert_equal_weights(weights_of(model), weights_of(trainer.model))


def test_memory_on_sees_the_batches_and_masks_of_memory_off(build_model, train, monkeypatch):
    import memdlm.training.trainer as module

    seen = []

    def recording(*args):
        plan = plan_step(*args)
        seen[-1].append((plan.noisy, plan.supervision.coefficients))
        return plan

    monkeypatch.setattr(module, "plan_step", recording)
    losses = []
    for memory in (OFF, MemoryConfig(loss="kl", **SMALL), MemoryConfig(sharing="batch", **SMALL)):
        seen.append([])
        model = build_model("llada", attention_dropout=0.1)
        losses.append(losses_of(train(model, memory=memory, max_steps=8)))
    for other in seen[1:]:
        for (noisy, factors), (plain_noisy, plain_factors) in zip(other, seen[0], strict=True):
            assert torch.equal(noisy, plain_noisy) and torch.equal(factors, plain_factors)
    assert len(seen[0]) == 8
    assert losses[0] != losses[1] != losses[2]


@pytest.mark.parametrize("memory", [OFF, MemoryConfig(**SMALL)])
def test_every_parameter_moves_in_full_training(family, traits, memory, build_model, train):
    before = weights_of(build_model(family))
    trainer = train(build_model(family), memory=memory, max_steps=8)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith(traits.fixed), name


@pytest.mark.parametrize("memory", [OFF, MemoryConfig(**SMALL)])
def test_lora_factors_move_and_frozen_weights_do_not(
    family, traits, memory, build_model, build_lora, train
):
    peft_config = build_lora(lora_dropout=0.1)
    trainer = train(build_model(family), peft_config=peft_config, memory=memory, max_steps=3)
    base = weights_of(build_model(family))
    num_trainable = 0
    for name, parameter in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            num_trainable += 1
            assert parameter.requires_grad
            # B starts at zero; A is drawn, so look at what AdamW has seen of it
            state = trainer.optimizer.state[parameter]
            assert state["exp_avg"].abs().sum() > 0, name
            if "lora_B" in name:
                assert parameter.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and torch.equal(parameter, base[plain]), name
    adapted = [
        name
        for name, module in build_model(family).named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in traits.linear
    ]
    stacks = [module for module in build_model(family).modules() if isinstance(module, Experts)]
    assert num_trainable == 2 * (len(adapted) + len(Experts.projections) * len(stacks))


def test_gradient_accumulation_averages_the_micro_batch_losses(build_model, train):
    trainer = train(
        build_model("llada"),
        memory=OFF,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_grad_norm=0,
    )
    model = build_model("llada").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 3e-3 * (2 - step) / 2
        pair = trainer.batches[2 * step : 2 * step + 2]
        loss = sum(plain_loss(model, batch, step, micro) for micro, batch in enumerate(pair)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(losses, losses_of(trainer), rtol=1e-6, atol=0)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_micro_batches_of_one_step_draw_different_masks_and_two_runs_the_same(build_model, train):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2}
    model = build_model("llada")
    trainer = train(model, **settings)
    first = losses_of(trainer)
    # A second run of the same trainer object starts its streams anew.
    model.load_state_dict(build_model("llada").state_dict())
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert losses_of(trainer)[-2:] == first


@pytest.mark.parametrize("is_adapted", [False, True])
def test_gradient_checkpointing_trains_the_same(family, is_adapted, build_model, build_lora, train):
    memory = MemoryConfig(loss="kl", scope="ffn_attention", **SMALL)
    peft_config = build_lora(lora_dropout=0.1) if is_adapted else None
    runs = [
        train(build_model(family), peft_config=peft_config, memory=memory, max_steps=3, **settings)
        for settings in ({}, {"gradient_checkpointing": True})
    ]
    assert runs[1].model.is_activation_checkpointing
    torch.testing.assert_close(losses_of(runs[0]), losses_of(runs[1]), rtol=1e-6, atol=1e-6)
    second = runs[1].model.state_dict()
    for key, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-6)


# The teacher of kl casts the weights without gradient before anybody needs one from them.
@pytest.mark.parametrize(
    ("loss", "is_adapted", "is_checkpointed"),
    [
        ("cross_entropy", False, False),
        ("kl", False, True),
        ("kl", True, False),
        ("kl", True, True),
        ("hidden_mse", False, False),
    ],
)
def test_bf16_autocast_gives_every_parameter_a_gradient(
    family, loss, is_adapted, is_checkpointed, build_model, build_lora, train
):
    trainer = train(
        build_model(family),
        peft_config=build_lora(lora_dropout=0.1) if is_adapted else None,
        bf16=True,
        max_steps=1,
        activation_checkpointing=is_checkpointed,
        memory=MemoryConfig(loss=loss, scope="ffn_attention", **SMALL),
    )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter in trainer.optimizer.state, name
            if "lora_A" not in name:  # zero in the first step, since B is
                assert trainer.optimizer.state[parameter]["exp_avg"].abs().sum() > 0, name
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["dropped_memories"] == 0 and line["fast_delta_norm"] > 0


def test_bf16_weights_train(family, build_model, train):
    model = build_model(family).to(torch.bfloat16)
    trainer = train(model, memory=MemoryConfig(**SMALL), max_steps=2, learning_rate=0.05)
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["dropped_memories"] == 0 and line["fast_delta_norm"] > 0


def test_evaluation_never_attaches_a_memory_and_repeats_itself(
    build_model, train, rows, monkeypatch
):
    on = train(build_model("llada"), max_steps=1, eval_dataset=rows[:5])

    def refuse(self, model):
        raise AssertionError("a memory was attached during evaluation")

    monkeypatch.setattr(FastWeights, "attach", refuse)
    first, second = on.evaluate(), on.evaluate()
    for name in ("eval_loss", "eval_nll"):
        assert first[name] == second[name]
    assert on.model.training is False
    off = train(build_model("llada"), memory=OFF, max_steps=1, eval_dataset=rows[:5])
    off.model.load_state_dict(on.model.state_dict())
    assert off.evaluate()["eval_loss"] == first["eval_loss"]
    assert not any("inner_loss" in name for name in first)


def test_evaluating_in_between_changes_nothing_in_training(build_model, train, rows):
    plain = train(build_model("llada", attention_dropout=0.1))
    asked = train(
        build_model("llada", attention_dropout=0.1),
        eval_dataset=rows[:3],
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluations = [line["eval_loss"] for line in asked.state.log_history if "eval_loss" in line]
    assert len(evaluations) == 4 and len(set(evaluations)) == 4
    assert losses_of(plain) == losses_of(asked)
    assert_equal_weights(weights_of(plain.model), weights_of(asked.model))


def test_logged_metrics(build_model, train):
    lines = [
        line
        for line in train(build_model("llada"), logging_steps=2).state.log_history
        if "loss" in line
    ]
    expected = {
        "nll",
        "inner_loss_1",
        "inner_loss_2",
        "fast_grad_norm_1",
        "fast_grad_norm_2",
        "clipped_share",
        "fast_delta_norm",
        "dropped_memories",
        "tokens_per_second",
    }
    assert len(lines) == 2
    for line in lines:
        assert expected <= line.keys()
        assert 0 <= line["clipped_share"] <= 1
        assert line["inner_loss_1"] > 0 and line["fast_delta_norm"] > 0
        assert line["tokens_per_second"] > 0
    off = train(build_model("llada"), memory=OFF).state.log_history[0]
    assert "nll" in off and not expected - {"nll", "tokens_per_second"} & off.keys()


def test_logged_averages_are_those_of_the_steps(build_model, train):
    single = [
        line for line in train(build_model("llada")).state.log_history if "inner_loss_1" in line
    ]
    double = [
        line
        for line in train(build_model("llada"), logging_steps=2).state.log_history
        if "inner_loss_1" in line
    ]
    for name in ("nll", "inner_loss_2", "fast_grad_norm_1", "clipped_share", "fast_delta_norm"):
        for index, line in enumerate(double):
            pair = [single[2 * index][name], single[2 * index + 1][name]]
            assert line[name] == pytest.approx(sum(pair) / 2, rel=1e-5)


def test_a_collator_of_ones_own_gives_the_same_run(rows, build_model, train, make_args):
    from memdlm import MemDLMTrainer
    from memdlm.data.collation import Collator

    def collate(features):
        batch = Collator(59)(features)
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}

    trainer = MemDLMTrainer(
        build_model("llada"), make_args(), train_dataset=rows, data_collator=collate
    )
    trainer.train()
    assert losses_of(trainer) == losses_of(train(build_model("llada")))


def test_models_that_cannot_be_trained_are_refused(build_model, make_args):
    from memdlm import MemDLMTrainer

    model = build_model("llada")
    model.config.mask_token_id = None
    with pytest.raises(DataError, match="mask_token_id"):
        MemDLMTrainer(model, make_args(), train_dataset=[])
    with pytest.raises(UsageError, match="holds no memdlm backbone"):
        MemDLMTrainer(torch.nn.Linear(2, 2), make_args(), train_dataset=[])
    memory = MemoryConfig(scope="modules", modules=("nothing",))
    with pytest.raises(ConfigError, match="selects no module"):
        MemDLMTrainer(build_model("llada"), make_args(memory=memory), train_dataset=[])
    with pytest.raises(UsageError, match="holds no memdlm backbone"):
        MemDLMTrainer("a/name", make_args(), train_dataset=[])


def test_calls_that_could_not_do_what_they_say_are_refused(build_model, make_args, tmp_path):
    from transformers import TrainingArguments

    from memdlm import MemDLMTrainer

    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UsageError, match="TrainingArguments; use MemDLMConfig"):
        MemDLMTrainer(build_model("llada"), plain, train_dataset=[])
    with pytest.raises(ConfigError, match="compute_metrics: evaluation returns losses alone"):
        MemDLMTrainer(
            build_model("llada"), make_args(), train_dataset=[], compute_metrics=lambda given: {}
        )


def test_a_batch_without_labels_is_refused(build_model, make_args, rows):
    from memdlm import MemDLMTrainer

    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    with pytest.raises(DataError, match="a row has no labels"):
        MemDLMTrainer(build_model("llada"), make_args(), train_dataset=unlabelled).train()

    def collate(features):
        return {"input_ids": torch.zeros(len(features), 5, dtype=torch.int64)}

    trainer = MemDLMTrainer(
        build_model("llada"), make_args(), train_dataset=rows, data_collator=collate
    )
    with pytest.raises(DataError, match="the batch has no labels"):
        trainer.train()
