"""Promises that every trajectory in the table keeps, whatever the batch."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from memdlm.diffusion.corruption import corrupt, draw_time
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch
from memdlm.memory.config import SUPERVISIONS, TRAJECTORY_NAMES, MemoryConfig
from memdlm.memory.placement import first_adapted_layer
from memdlm.memory.trajectories import TRAJECTORIES, TrajectoryRequest, build_trajectory
from memdlm.memory.trajectories.anchor_consistent import mask_counts

MASK = 60
STEPS = (1, 2, 3, 4)
TABLE = list(itertools.product(TRAJECTORIES, STEPS))


def edge_batch() -> CleanBatch:
    """Rows: ordinary, ordinary with padding, all maskable, one maskable token, none maskable."""
    clean = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(1))
    labels = clean.clone()
    labels[:2, :5] = -100
    labels[3, :-1] = -100
    labels[4] = -100
    labels[5, :3] = -100
    padding = torch.zeros_like(clean, dtype=torch.bool)
    padding[1, 18:] = True
    return CleanBatch.from_labels(clean, labels, padding)


def request_for(name: str, num_steps: int = 2, seed: int = 0, **settings) -> TrajectoryRequest:
    batch = edge_batch()
    draws = torch.Generator().manual_seed(seed)
    t = draw_time(6, 1e-3, draws)
    t[2], t[5] = 1.0, 0.0  # a saturated row and one where nothing is masked
    anchor = corrupt(batch, t, get_schedule("linear"), MASK, draws)
    config = MemoryConfig(trajectory=name, num_steps=num_steps, **settings)
    return TrajectoryRequest(batch, anchor, t, config, MASK, torch.Generator().manual_seed(seed))


def states_of(trajectory):
    for step in trajectory.transitions:
        yield from (step.source, step.target)


def test_the_table_holds_exactly_the_names_that_the_config_allows():
    assert tuple(TRAJECTORIES) == TRAJECTORY_NAMES


@pytest.mark.parametrize(("name", "num_steps"), TABLE)
@pytest.mark.parametrize("seed", range(5))
def test_visible_tokens_are_clean_and_only_maskable_ones_are_hidden(name, num_steps, seed):
    request = request_for(name, num_steps, seed)
    for state in states_of(build_trajectory(request)):
        assert torch.equal(state.ids[~state.masked], request.batch.clean[~state.masked])
        assert (state.ids[state.masked] == MASK).all()
        assert not (state.masked & ~request.batch.maskable).any()


@pytest.mark.parametrize(("name", "num_steps"), TABLE)
@pytest.mark.parametrize("seed", range(5))
def test_a_target_never_hides_more_than_its_source(name, num_steps, seed):
    transitions = build_trajectory(request_for(name, num_steps, seed)).transitions
    for step in transitions:
        assert not (step.target.masked & ~step.source.masked).any()
    for earlier, later in itertools.pairwise(transitions):
        assert later.source is earlier.target


@pytest.mark.parametrize(("name", "num_steps"), TABLE)
def test_same_generator_same_trajectory(name, num_steps):
    first = build_trajectory(request_for(name, num_steps, 3))
    state = torch.get_rng_state()
    again = build_trajectory(request_for(name, num_steps, 3))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(states_of(first), states_of(again), strict=True):
        assert torch.equal(one.ids, two.ids) and torch.equal(one.masked, two.masked)


@pytest.mark.parametrize(("name", "num_steps"), TABLE)
def test_the_number_of_steps_and_finite_times(name, num_steps):
    trajectory = build_trajectory(request_for(name, num_steps))
    single = name in ("pre_anchor_only", "anchor_to_target")
    assert len(trajectory.transitions) == (1 if single else num_steps)
    for step in trajectory.transitions:
        assert step.t.shape == (6,) and step.t.dtype == torch.float32
        assert ((step.t >= 0) & (step.t <= 1)).all()


@pytest.mark.parametrize(("name", "num_steps"), TABLE)
@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_only_hidden_tokens_are_scored(name, num_steps, supervision):
    for step in build_trajectory(request_for(name, num_steps)).transitions:
        scored = step.supervised(supervision)
        assert not (scored & ~step.source.masked).any()
        if supervision == "masked":
            assert torch.equal(scored, step.source.masked)
        else:
            assert not (scored & step.target.masked).any()


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("seed", range(5))
def test_anchor_consistent_ends_on_the_very_anchor_and_starts_above_it(num_steps, seed):
    request = request_for("anchor_consistent", num_steps, seed)
    trajectory = build_trajectory(request)
    assert trajectory.anchor is request.anchor
    sources = [step.source for step in trajectory.transitions]
    for source in sources:
        assert not (request.anchor.masked & ~source.masked).any()
    if num_steps > 1:
        assert sources[-1] is request.anchor
        assert not trajectory.transitions[-1].target.masked.any()
    total = request.batch.maskable.sum(dim=1)
    masked = request.anchor.masked.sum(dim=1)
    ratio = masked / total.clamp(min=1)
    expected = total * (1.5 * ratio).clamp(max=1)
    start = sources[0].masked.sum(dim=1)
    assert ((start - expected).abs() < 1 + 1e-4).all()
    assert start[2] == total[2] and start[5] == 0 and start[4] == 0
    # the time that weighs a step is its realised ratio
    for step in trajectory.transitions:
        torch.testing.assert_close(step.t, step.source.masked.sum(dim=1) / total.clamp(min=1))


def test_scale_one_starts_at_the_anchors_own_mask():
    trajectory = build_trajectory(request_for("anchor_consistent", pre_anchor_scale=1.0))
    first, last = (step.source.masked for step in trajectory.transitions)
    assert torch.equal(first, last)


def test_one_step_variants_visit_what_their_names_say():
    request = request_for("pre_anchor_only")
    (step,) = build_trajectory(request).transitions
    assert step.target is request.anchor
    (pre_anchor, *_) = build_trajectory(request_for("anchor_consistent")).transitions
    assert torch.equal(step.source.masked, pre_anchor.source.masked)
    request = request_for("anchor_to_target")
    (step,) = build_trajectory(request).transitions
    assert step.source is request.anchor and not step.target.masked.any()
    assert torch.equal(step.t, request.t)


def test_inconsistent_ignores_the_anchor_and_falls_to_its_end_ratio():
    clean = torch.randint(0, 50, (3, 3000), generator=torch.Generator().manual_seed(0))
    batch = CleanBatch.from_labels(clean, clean)
    config = MemoryConfig(trajectory="inconsistent", num_steps=3)
    seen = []
    for masked in (torch.zeros_like(batch.maskable), batch.maskable):
        anchor = batch.state(masked, MASK)
        draws = torch.Generator().manual_seed(4)
        request = TrajectoryRequest(batch, anchor, torch.ones(3), config, MASK, draws)
        seen.append([step.source.masked for step in build_trajectory(request).transitions])
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)
    shares = torch.stack([masked.float().mean() for masked in seen[0]])
    torch.testing.assert_close(shares, torch.tensor([0.8, 0.5, 0.2]), rtol=0, atol=0.02)


@pytest.mark.parametrize("num_steps", (2, 3, 4))
@pytest.mark.parametrize("scale", (1.25, 1.5, 1.75, 2.0))
def test_mask_counts_equal_the_published_table(num_steps, scale, fixtures):
    table = load_file(fixtures / "tables" / "mask_counts_small.safetensors")
    key = f"k{num_steps}.scale{scale}"
    counts = mask_counts(table["final_masked"].long(), table["total"].long(), num_steps, scale)
    assert torch.equal(counts, table[f"{key}.counts"].long())
    ratio = counts.float() / table["total"].clamp(min=1).float()[:, None]
    torch.testing.assert_close(ratio, table[f"{key}.t"], rtol=1e-6, atol=1e-7)


def test_one_step_counts_are_the_pre_anchors():
    masked, total = torch.tensor([0, 2, 5, 10]), torch.tensor([10, 10, 10, 10])
    assert mask_counts(masked, total, 1, 1.5).tolist() == [[0], [3], [7], [10]]


def test_first_adapted_layer_equals_the_published_table(fixtures):
    rows = json.loads((fixtures / "tables" / "layer_selection.json").read_text())
    # A fraction out of range means something else there; ours refuses it.
    rows = [row for row in rows if 0 < row["fraction"] <= 1]
    assert len(rows) > 100
    for row in rows:
        actual = first_adapted_layer(row["num_layers"], row["fraction"])
        assert actual == row["first_layer"], row
