"""One step: what it shares, what it never computes, and what it survives."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from memdlm.diffusion.corruption import corrupt
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.memory.config import LOSS_NAMES, TRAJECTORY_NAMES, MemoryConfig
from memdlm.memory.trajectories import (
    Trajectory,
    TrajectoryRequest,
    Transition,
    build_trajectory,
)
from memdlm.training.outer_step import OuterStep, StepPlan, lay_out_step, plan_step

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
OFF = MemoryConfig(enabled=False)


def counting_hooks(model):
    """Count the calls of every layer and the rows that the head sees."""
    calls, rows = Counter(), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    return calls, rows


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("sharing", ["sequence", "batch"])
def test_no_host_sync_in_forward_and_backward(
    family, loss, sharing, build_model, build_batch, lay_out, no_host_sync
):
    model = build_model(family)
    memory = MemoryConfig(loss=loss, sharing=sharing, scope="ffn_attention", **SMALL)
    plan = lay_out(build_batch(), memory)
    step = OuterStep(model, memory)
    with no_host_sync:
        step.forward(model, plan).loss.backward()
        step.release()
    assert no_host_sync.num_operators > 500


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("clip_scope", ["local", "global"])
def test_no_host_sync_with_other_updates_and_masks(
    kind, clip_scope, build_model, build_batch, lay_out, no_host_sync
):
    model = build_model("llada_moe", shared_expert_intermediate_size=16)
    memory = MemoryConfig(kind=kind, clip_scope=clip_scope, num_epochs=2, **SMALL)
    plan = lay_out(build_batch(), memory, ObjectiveConfig(padding="excluded"))
    step = OuterStep(model, memory)
    with no_host_sync:
        step.forward(model, plan).loss.backward()
        step.release()


def test_the_watch_for_host_syncs_can_fail(no_host_sync):
    with no_host_sync, pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(3).sum().item()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2),  # outer pass, which inner step 2 shares, and the pre-anchor
        ({"num_epochs": 3}, 2),
        ({"num_steps": 1}, 2),
        ({"num_steps": 3}, 3),
        ({"loss": "kl"}, 3),  # and the clean tokens for the last teacher
        ({"trajectory": "pre_anchor_only"}, 2),
        ({"trajectory": "anchor_to_target"}, 1),
        ({"trajectory": "inconsistent"}, 3),
    ],
)
def test_early_layers_run_once_per_state(
    family, settings, expected, build_model, build_batch, lay_out
):
    model = build_model(family)
    memory = MemoryConfig(**{**SMALL, **settings})
    calls, _ = counting_hooks(model)
    OuterStep(model, memory).forward(model, lay_out(build_batch(), memory))
    assert calls[0] == calls[1] == expected
    assert calls[2] == calls[3]


def test_logits_are_computed_at_supervised_positions_only(
    family, build_model, build_batch, lay_out
):
    model = build_model(family)
    memory = MemoryConfig(**SMALL)
    plan = lay_out(build_batch(), memory)
    _, rows = counting_hooks(model)
    result = OuterStep(model, memory).forward(model, plan, keep_logits=True)
    inner = [step.supervision.labels.numel() for step in plan.inner.steps]
    assert rows == [*inner, plan.supervision.labels.numel()]
    assert result.logits.shape == (rows[-1], 61)
    assert rows[-1] < plan.noisy.numel()

    rows.clear()
    hidden = MemoryConfig(loss="hidden_mse", **SMALL)
    OuterStep(model, hidden).forward(model, lay_out(build_batch(), hidden))
    assert rows == [plan.supervision.labels.numel()]  # hidden losses need no vocabulary


def test_outer_draws_do_not_depend_on_the_memory(build_batch, lay_out):
    batch = build_batch()
    plain = lay_out(batch, OFF)
    for name in TRAJECTORY_NAMES:
        for settings in ({}, {"sharing": "batch"}, {"num_steps": 4}, {"kind": "full"}):
            plan = lay_out(batch, MemoryConfig(trajectory=name, **settings))
            assert torch.equal(plan.noisy, plain.noisy)
            assert torch.equal(plan.supervision.coefficients, plain.supervision.coefficients)
    assert plain.inner is None
    other = lay_out(batch, OFF, indices=(0, 5, 0, 0))
    assert not torch.equal(other.noisy, plain.noisy)


def test_memory_off_is_the_plain_loss_and_phi_k_changes_it(
    family, build_model, build_batch, lay_out
):
    model = build_model(family)
    memory = MemoryConfig(**SMALL)
    plan = lay_out(build_batch(), memory)
    plain = OuterStep(model, OFF).forward(model, replace(plan, inner=None))
    assert plain.inner is None and plain.fast_weights is None
    step = OuterStep(model, memory)
    with_memory = step.forward(model, plan)
    step.release()
    assert with_memory.loss != plain.loss
    again = OuterStep(model, OFF).forward(model, replace(plan, inner=None))
    assert torch.equal(again.loss, plain.loss)


def test_no_gradient_on_fast_weights_and_none_from_the_inner_loop(
    family, build_model, build_batch, lay_out
):
    model = build_model(family)
    memory = MemoryConfig(loss="kl", **SMALL)
    step = OuterStep(model, memory)
    result = step.forward(model, lay_out(build_batch(), memory))
    assert all(parameter.grad is None for parameter in model.parameters())
    result.loss.backward()
    step.release()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for tensor in result.fast_weights.tensors.values():
        assert tensor.grad is None and not tensor.requires_grad


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("trains", ["all", "all but the head"])
def test_logits_in_chunks_change_nothing(family, loss, trains, build_model, build_batch, lay_out):
    model = build_model(family).train()
    model.lm_head.requires_grad_(trains == "all")
    memory = MemoryConfig(loss=loss, **SMALL)
    plan = lay_out(build_batch(), memory)
    step = OuterStep(model, memory)
    _, rows = counting_hooks(model)
    results, grads = [], []
    for tokens in (3, 1000):
        budget = 4 * model.config.vocab_size * tokens
        assert plan.inner is not None
        inner = replace(plan.inner, logits_budget=budget)
        rows.clear()
        results.append(
            step.forward(model, replace(plan, inner=inner, logits_budget=budget), keep_logits=True)
        )
        assert max(rows) <= tokens
        results[-1].loss.backward()
        step.release()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    chunked, whole = results
    for name in ("loss", "nll", "logits"):
        torch.testing.assert_close(
            getattr(chunked, name), getattr(whole, name), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(chunked.inner.losses, whole.inner.losses, rtol=1e-5, atol=1e-6)
    for name, tensor in whole.fast_weights.tensors.items():
        torch.testing.assert_close(chunked.fast_weights.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_logits_are_not_kept_unless_asked_for(build_model, build_batch, lay_out):
    model = build_model("llada")
    assert OuterStep(model, OFF).forward(model, lay_out(build_batch(), OFF)).logits is None


def test_the_global_random_state_is_that_of_a_step_without_memory(
    family, build_model, build_batch, lay_out
):
    model = build_model(family, attention_dropout=0.2).train()
    states = []
    for memory in (OFF, MemoryConfig(loss="kl", **SMALL)):
        torch.manual_seed(5)
        step = OuterStep(model, memory)
        step.forward(model, lay_out(build_batch(), memory)).loss.backward()
        step.release()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def slice_row(state: State, row: int, length: int) -> State:
    return State(state.ids[row, None, :length], state.masked[row, None, :length])


@pytest.mark.parametrize("scope", ["ffn", "ffn_attention"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("normaliser", ["token", "sequence", "batch"])
def test_each_row_of_a_batch_equals_the_row_alone(
    family, scope, kind, normaliser, build_model, build_batch
):
    model = build_model(family)
    lengths = (14, 8, 11)
    batch = build_batch(lengths).without_padding()
    memory = MemoryConfig(kind=kind, scope=scope, normaliser=normaliser, num_steps=3, **SMALL)
    objective = ObjectiveConfig(padding="excluded")
    t = torch.tensor([0.5, 0.3, 0.8])
    draws = torch.Generator().manual_seed(1)
    anchor = corrupt(batch, t, get_schedule("linear"), 60, draws)
    trajectory = build_trajectory(TrajectoryRequest(batch, anchor, t, memory, 60, draws))

    def run(batch, anchor, t, trajectory):
        plan = lay_out_step(batch, anchor, t, trajectory, objective, memory, (0, 0, 0, 0))
        step = OuterStep(model, memory)
        result = step.forward(model, plan)
        step.release()
        return plan, result

    plan, together = run(batch, anchor, t, trajectory)
    for row, length in enumerate(lengths):
        alone = CleanBatch(*(part[row, None, :length] for part in vars(batch).values()))
        # Keep which states are the same object: that is what shares early layers.
        cut = {id(state): slice_row(state, row, length) for state in all_states(trajectory)}
        transitions = tuple(
            Transition(cut[id(step.source)], cut[id(step.target)], step.t[row, None])
            for step in trajectory.transitions
        )
        one = Trajectory(transitions, cut[id(anchor)])
        _, single = run(alone, cut[id(anchor)], t[row, None], one)
        for name, tensor in single.fast_weights.tensors.items():
            torch.testing.assert_close(
                together.fast_weights.tensors[name][row], tensor[0], rtol=0, atol=1e-6
            )
        torch.testing.assert_close(
            together.nll[plan.supervision.rows == row], single.nll, rtol=1e-5, atol=1e-6
        )


def all_states(trajectory):
    yield trajectory.anchor
    for step in trajectory.transitions:
        yield from (step.source, step.target)


POISON = 57


def poisoned_plan(build_batch, memory, is_poisoned=True) -> StepPlan:
    """Plan a step in which only row 1's inner loop sees the token POISON."""
    batch = build_batch((12, 12, 12))
    clean = torch.where(batch.clean == POISON, 1, batch.clean)
    if is_poisoned:
        clean[1, 6] = POISON
    batch = CleanBatch.from_labels(clean, torch.where(batch.maskable, clean, -100))
    hidden, visited = torch.zeros_like(batch.maskable), torch.zeros_like(batch.maskable)
    hidden[:, 5:8] = True
    visited[:, [5, 8]] = True
    anchor, source = batch.state(hidden, 60), batch.state(visited, 60)
    t = torch.full((3,), 0.3)
    steps = (Transition(source, batch.clean_state(), t), Transition(anchor, batch.clean_state(), t))
    return lay_out_step(
        batch, anchor, t, Trajectory(steps, anchor), ObjectiveConfig(), memory, (0, 0, 0, 0)
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_non_finite_inner_loop_drops_that_rows_memory_alone(
    family, value, kind, build_model, build_batch
):
    memory = MemoryConfig(kind=kind, **SMALL)
    plan = poisoned_plan(build_batch, memory)
    model = build_model(family)
    healthy_plan = poisoned_plan(build_batch, memory, is_poisoned=False)
    healthy = OuterStep(model, memory).forward(model, healthy_plan)
    assert healthy.inner.alive.all()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = value
    model = build_copy(model, family, build_model)
    plain = OuterStep(model, OFF).forward(model, replace(plan, inner=None))
    step = OuterStep(model, memory)
    result = step.forward(model, plan)
    assert result.inner.alive.tolist() == [True, False, True]
    rows = plan.supervision.rows
    assert torch.equal(result.nll[rows == 1], plain.nll[rows == 1])
    for row in (0, 2):
        # Not to the bit with experts: what row 1 sends to an expert decides the shape of a product.
        torch.testing.assert_close(
            result.nll[rows == row], healthy.nll[rows == row], rtol=1e-6, atol=1e-6
        )
        assert not torch.equal(result.nll[rows == row], plain.nll[rows == row])
    result.loss.backward()
    step.release()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def build_copy(model, family, build_model):
    """Return a model with the same weights and no hooks."""
    copy = build_model(family)
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_shared_memory_is_dropped_for_all_rows(build_model, build_batch):
    memory = MemoryConfig(sharing="batch", **SMALL)
    plan = poisoned_plan(build_batch, memory)
    model = build_model("llada")
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    plain = OuterStep(model, OFF).forward(model, replace(plan, inner=None))
    result = OuterStep(model, memory).forward(model, plan)
    assert result.inner.alive.tolist() == [False]
    assert torch.equal(result.loss, plain.loss)


def test_an_inner_loop_that_diverges_later_is_dropped_whole(
    family, build_model, build_batch, lay_out
):
    model = build_model(family)
    memory = MemoryConfig(learning_rate=1e25, clip_norm=None, num_steps=3, **SMALL)
    plan = lay_out(build_batch(), memory)
    plain = OuterStep(model, OFF).forward(model, replace(plan, inner=None))
    result = OuterStep(model, memory).forward(model, plan)
    assert result.inner.losses[0].isfinite().all()  # the first step was fine
    assert not result.inner.alive.any()
    assert torch.equal(result.loss, plain.loss)


@pytest.mark.parametrize("padding", ["supervised", "excluded", "excluded_inner"])
def test_padding_modes(padding, build_model, build_batch, lay_out):
    batch = build_batch((12, 7))
    memory = MemoryConfig(num_steps=2, **SMALL)
    objective = ObjectiveConfig(padding=padding)
    plan = next(
        plan
        for step in range(100)
        if (plan := lay_out(batch, memory, objective, (0, step, 0, 0))).supervision.labels.numel()
        > 12
    )
    on_padding = (plan.noisy == 60) & batch.padding
    assert bool(on_padding.any()) == (padding != "excluded")
    inner_on_padding = torch.stack([(s == 60) & batch.padding for s in plan.inner.states]).any()
    assert bool(inner_on_padding) == (padding == "supervised")
    assert (plan.attention_mask is not None) == (padding == "excluded")
    assert (plan.inner.anchor is not None) == (padding != "excluded_inner")
    model = build_model("llada")
    calls, _ = counting_hooks(model)
    assert OuterStep(model, memory).forward(model, plan).loss.isfinite()
    assert calls[0] == (3 if padding == "excluded_inner" else 2)


def test_a_batch_in_which_nothing_is_masked_is_a_step_of_nothing(
    family, build_model, build_batch, no_host_sync
):
    model = build_model(family)
    batch, memory = build_batch(), MemoryConfig(**SMALL)
    nothing = batch.state(torch.zeros_like(batch.maskable), 60)
    t = torch.full((3,), 0.1)
    steps = (Transition(nothing, batch.clean_state(), t),) * 2
    plan = lay_out_step(
        batch, nothing, t, Trajectory(steps, nothing), ObjectiveConfig(), memory, (0, 0, 0, 0)
    )
    step = OuterStep(model, memory)
    result = step.forward(model, plan)
    result.loss.backward()
    step.release()
    assert result.loss == 0 and result.inner.alive.all()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_same_indices_same_step(family, build_model, build_batch):
    model, batch, memory = build_model(family), build_batch(), MemoryConfig(**SMALL)
    losses = []
    for indices in ((0, 1, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0)):
        torch.rand(3)
        plan = plan_step(batch, ObjectiveConfig(), memory, 60, indices)
        step = OuterStep(model, memory)
        losses.append(step.forward(model, plan).loss)
        step.release()
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
