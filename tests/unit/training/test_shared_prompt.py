"""`memory.pre_anchor_prefix: shared_prompt`: where it is exact, what it costs, what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memdlm import MemDLMConfig
from memdlm.backbones.kv_cache import KeyRecorder
from memdlm.backbones.partial_prefix import partial_prefix
from memdlm.backbones.row_columns import RowColumns
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.diffusion.states import CleanBatch, State
from memdlm.errors import ConfigError
from memdlm.memory.config import TRAJECTORY_NAMES, MemoryConfig
from memdlm.memory.inner_loop import run_inner_loop
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.memory.trajectories import Trajectory, Transition
from memdlm.training.outer_step import OuterStep, lay_out_step
from tests.families import MASK, PAD

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
SHARED = {"pre_anchor_prefix": "shared_prompt", **SMALL}


def batch_of(prompts: tuple[int, ...], lengths: tuple[int, ...]) -> CleanBatch:
    """Make rows with a prompt and a total length each, right-padded."""
    draws = torch.Generator().manual_seed(3)
    clean = torch.randint(0, PAD, (len(lengths), max(lengths)), generator=draws)
    columns = torch.arange(max(lengths))[None]
    padding = columns >= torch.tensor(lengths)[:, None]
    maskable = columns >= torch.tensor(prompts)[:, None]
    return CleanBatch(torch.where(padding, PAD, clean), maskable, padding)


def run(model, plan, memory):
    """Run forward and backward of `plan`; return the result and the gradients."""
    model.zero_grad(set_to_none=True)
    step = OuterStep(model, memory)
    try:
        result = step.forward(model, plan)
        result.loss.backward()
    finally:
        step.release()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def both(model, batch, lay_out, objective=None, indices=(0, 4, 0, 0), **settings):
    """Return what the exact step and the approximate one give, same draws."""
    results = []
    for prefix in ("exact", "shared_prompt"):
        memory = MemoryConfig(**{**SMALL, **settings}, pre_anchor_prefix=prefix)
        results.append(run(model, lay_out(batch, memory, objective, indices), memory))
    return results


def assert_same(ours, theirs, **tolerance) -> None:
    """Compare losses, fast weights and gradients of two steps."""
    (result, grads), (expected, expected_grads) = ours, theirs
    torch.testing.assert_close(result.loss, expected.loss, **tolerance)
    torch.testing.assert_close(result.inner.losses, expected.inner.losses, **tolerance)
    torch.testing.assert_close(
        result.fast_weights.tensors, expected.fast_weights.tensors, **tolerance
    )
    torch.testing.assert_close(grads, expected_grads, **tolerance)


BIT_FOR_BIT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("padding", ["supervised", "excluded"])
def test_block_causal_attention_makes_it_exact_on_block_boundaries(
    loss, padding, build_model, lay_out
):
    model = build_model("llada2", attention="block_causal", block_length=4).train()
    batch = batch_of((8, 4, 12), (18, 13, 16))
    objective = ObjectiveConfig(padding=padding)
    for index in range(4):
        exact, shared = both(model, batch, lay_out, objective, (0, index, 0, 0), loss=loss)
        assert_same(shared, exact, **CLOSE)


def test_block_causal_attention_is_not_exact_inside_a_block(build_model, lay_out):
    model = build_model("llada2", attention="block_causal", block_length=8).train()
    batch, differences = batch_of((6, 3), (18, 13)), []
    for index in range(8):  # the states may agree on the few response tokens of the prompt's block
        exact, shared = both(model, batch, lay_out, indices=(0, index, 0, 0))
        differences.append((shared[0].inner.losses - exact[0].inner.losses).abs().max())
    assert max(differences) > 1e-3


@pytest.mark.parametrize("trajectory", TRAJECTORY_NAMES)
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_full_attention_gives_another_step_without_failing(
    family, trajectory, loss, build_model, lay_out
):
    model = build_model(family).train()
    batch = batch_of((10, 7), (14, 12))
    exact, shared = both(model, batch, lay_out, trajectory=trajectory, loss=loss)
    assert shared[0].inner.alive.all()
    assert all(grad.isfinite().all() for grad in shared[1].values())
    visits_another = trajectory != "anchor_to_target" or loss == "kl"  # the clean teacher
    assert torch.equal(shared[0].inner.losses, exact[0].inner.losses) != visits_another


def test_response_states_are_nearer_to_the_exact_ones_than_the_anchors(family, build_model):
    model = build_model(family).eval().model
    batch = batch_of((16, 12), (24, 24))
    draws = torch.rand(2, 24, generator=torch.Generator().manual_seed(0))
    anchor = batch.state(batch.maskable & (draws < 0.4), MASK)
    pre_anchor = batch.state(batch.maskable & (draws < 0.6), MASK)
    columns, recorder = RowColumns.pack(batch.maskable), KeyRecorder()
    with torch.no_grad():
        embedded, inputs = model.embed(anchor.ids)
        hidden = model.run_layers(embedded, replace(inputs, cache=recorder), 0, 3)
        recorded = recorder.take()
        exact = model.prefix(pre_anchor.ids, inputs, 3)
        shared = partial_prefix(model, pre_anchor.ids, inputs, 3, columns, recorded, hidden)
    at = batch.maskable
    assert torch.equal(shared[~at], hidden[~at])
    error = (shared - exact)[at].norm() / (hidden - exact)[at].norm()
    assert 0 < error < 0.7  # random weights exaggerate it, expert choices most


def test_recording_changes_nothing_where_only_the_anchor_is_visited(family, build_model, lay_out):
    model = build_model(family).train()
    batch = batch_of((3, 5), (12, 14))
    exact, shared = both(model, batch, lay_out, trajectory="anchor_to_target")
    assert_same(shared, exact, **BIT_FOR_BIT)


def test_with_all_layers_adapted_no_early_layer_is_left_to_differ(build_model, lay_out):
    model = build_model("llada").train()
    exact, shared = both(model, batch_of((3, 5), (12, 14)), lay_out, layer_fraction=1.0)
    assert_same(shared, exact, **BIT_FOR_BIT)


def test_a_batch_without_prompts_is_exact(family, build_model, lay_out):
    model = build_model(family).train()
    exact, shared = both(model, batch_of((0, 0), (9, 12)), lay_out)
    assert_same(shared, exact, **CLOSE)


def test_the_default_records_nothing_and_runs_whole_sequences(build_model, lay_out):
    model = build_model("llada")
    memory = MemoryConfig(**SMALL)
    plan = lay_out(batch_of((3, 5), (12, 14)), memory)
    assert memory.pre_anchor_prefix == "exact" and plan.inner.responses is None
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda _, args, out: seen.append((args[0].shape[1], args[1].cache))
    )
    run(model, plan, memory)
    assert seen == [(14, None), (14, None)]


@pytest.mark.parametrize("trajectory", ["anchor_consistent", "inconsistent"])
def test_each_row_equals_the_row_alone_whatever_the_prompts(family, trajectory, build_model):
    model = build_model(family)
    prompts, lengths = (9, 2, 6), (14, 8, 11)
    memory = MemoryConfig(num_steps=3, trajectory=trajectory, **SHARED)
    objective = ObjectiveConfig(padding="excluded")
    batch = batch_of(prompts, lengths).without_padding()
    draws = torch.Generator().manual_seed(1)

    def state(ratio: float) -> State:
        return batch.state(batch.maskable & (torch.rand(3, 14, generator=draws) < ratio), MASK)

    anchor, before = state(0.5), state(0.9)
    anchor.masked[:, 7] |= batch.maskable[:, 7]  # every row has something to predict
    anchor.masked[0, 10] = True
    anchor = batch.state(anchor.masked, MASK)
    t = torch.tensor([0.5, 0.3, 0.8])
    clean = batch.clean_state()

    def step_of(rows, length):
        part = slice(rows, rows + 1) if rows is not None else slice(None)

        def cut(state):
            return State(state.ids[part, :length], state.masked[part, :length])

        own = CleanBatch(*(value[part, :length] for value in vars(batch).values()))
        x, y, z = cut(before), cut(anchor), cut(clean)
        trajectory = Trajectory((Transition(x, y, t[part]), Transition(y, z, t[part])), y)
        plan = lay_out_step(own, y, t[part], trajectory, objective, memory, (0, 0, 0, 0))
        return run(model, plan, memory)[0], plan

    together, plan = step_of(None, 14)
    for row, length in enumerate(lengths):
        alone, one = step_of(row, length)
        assert one.inner.responses.positions.shape[1] == length - prompts[row]
        for name, tensor in alone.fast_weights.tensors.items():
            torch.testing.assert_close(
                together.fast_weights.tensors[name][row], tensor[0], rtol=0, atol=1e-6
            )
        torch.testing.assert_close(
            together.nll[plan.supervision.rows == row], alone.nll, rtol=1e-5, atol=1e-6
        )


def test_gradient_checkpointing_gives_the_same_step(family, build_model, lay_out):
    batch = batch_of((9, 4), (14, 12))
    memory = MemoryConfig(loss="kl", scope="ffn_attention", **SHARED)
    results = []
    for is_checkpointed in (False, True):
        model = build_model(family, attention_dropout=0.0).train()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        results.append(run(model, lay_out(batch, memory), memory))
    assert torch.equal(results[0][0].loss, results[1][0].loss)
    assert_same(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_it_runs_under_autocast(family, build_model, lay_out):
    model = build_model(family).train()
    batch, memory = batch_of((9, 4), (14, 12)), MemoryConfig(**SHARED)
    plan = lay_out(batch, memory)
    plain, _ = run(model, plan, memory)
    with torch.autocast("cpu", torch.bfloat16):
        cast, grads = run(model, plan, memory)
    assert cast.loss.item() == pytest.approx(plain.loss.item(), rel=0.05)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_the_host_never_waits(family, build_model, lay_out, no_host_sync):
    model = build_model(family)
    memory = MemoryConfig(loss="kl", **SHARED)
    plan = lay_out(batch_of((9, 4), (14, 12)), memory, ObjectiveConfig(padding="excluded"))
    step = OuterStep(model, memory)
    with no_host_sync:
        step.forward(model, plan).loss.backward()
        step.release()


def early_flops(model, plan, memory) -> list[int]:
    """Return the FLOPs of each pass through the feed-forwards and projections of layer 0."""
    counts, counter = [], FlopCounterMode(display=False)
    layer = model.model.layers[0]

    def before(*_):
        counts.append(-counter.get_total_flops())

    def after(*_):
        counts[-1] += counter.get_total_flops()

    hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with counter:
        step = OuterStep(model, memory)
        step.forward(model, plan)
        step.release()
    for hook in hooks:
        hook.remove()
    return counts


def test_the_first_inner_step_costs_only_the_response(build_model, lay_out):
    model = build_model("llada")
    shares = {}
    for response in (8, 16, 32):
        batch = batch_of((64 - response,) * 2, (64, 64))
        memory = MemoryConfig(**SHARED)
        anchor, pre_anchor = early_flops(model, lay_out(batch, memory), memory)
        shares[response] = pre_anchor / anchor
        exact = MemoryConfig(**SMALL)
        whole = early_flops(model, lay_out(batch, exact), exact)
        assert whole == [anchor, anchor]
    # Attention is linear in the queries too: all keys are there in both.
    assert shares == pytest.approx({8: 8 / 64, 16: 16 / 64, 32: 32 / 64})


def test_padding_that_differs_from_the_outer_state_is_refused(build_batch, lay_out, tmp_path):
    memory, objective = MemoryConfig(**SHARED), ObjectiveConfig(padding="excluded_inner")
    for refused in (
        lambda: lay_out(build_batch(), memory, objective),
        lambda: MemDLMConfig(str(tmp_path), memory=memory, objective=objective, use_cpu=True),
    ):
        with pytest.raises(ConfigError, match=r"memory\.pre_anchor_prefix.*excluded_inner") as e:
            refused()
        assert "\n" not in str(e.value)
    MemDLMConfig(str(tmp_path), memory=memory, use_cpu=True)
    off = replace(memory, enabled=False)
    assert lay_out(build_batch(), off, objective).inner is None


def test_a_plan_with_responses_needs_what_the_anchor_had(build_model, lay_out):
    model, memory = build_model("llada"), MemoryConfig(**SHARED)
    plan = lay_out(batch_of((9, 4), (14, 12)), memory)
    fast = OuterStep(model, memory).initial_fast_weights(plan)
    _, inputs = model.model.embed(plan.noisy)
    with pytest.raises(ValueError, match="needs the anchor's"):
        run_inner_loop(model, fast, plan.inner, memory, inputs)


def test_a_memory_written_from_a_prompt_takes_no_notice(build_model):
    model = build_model("llada").eval()
    ids = torch.randint(0, PAD, (1, 20), generator=torch.Generator().manual_seed(0))
    written = []
    for prefix in ("exact", "shared_prompt"):
        memory = ParametricMemory(model, MemoryConfig(**SMALL, pre_anchor_prefix=prefix))
        memory.write(ids)
        written.append(memory.fast_weights.tensors)
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
