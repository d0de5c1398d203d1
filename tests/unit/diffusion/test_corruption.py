import pytest
import torch

from memdlm.diffusion.corruption import corrupt, draw_time, mask_more, reveal
from memdlm.diffusion.schedule import get_schedule
from memdlm.diffusion.states import CleanBatch
from memdlm.seeding import generator

MASK = 60


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def wide_batch(rows=4, length=4000):
    clean = torch.randint(0, 50, (rows, length), generator=draws(5))
    labels = clean.clone()
    labels[:, :1000] = -100
    return CleanBatch.from_labels(clean, labels)


def test_times_are_uniform_above_epsilon():
    t = draw_time(20_000, 0.2, draws())
    assert t.dtype == torch.float32
    assert t.min() >= 0.2 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.6, abs=0.01)
    assert torch.equal(t, draw_time(20_000, 0.2, draws()))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_corruption_masks_the_schedules_share_of_the_response_only(name):
    batch, schedule = wide_batch(), get_schedule(name)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    state = corrupt(batch, t, schedule, MASK, draws())
    assert not (state.masked & ~batch.maskable).any()
    assert torch.equal(state.ids == MASK, state.masked)
    assert torch.equal(state.ids[~state.masked], batch.clean[~state.masked])
    share = state.masked.sum(dim=1) / batch.maskable.sum(dim=1)
    torch.testing.assert_close(share, 1 - schedule.alpha(t), rtol=0, atol=0.03)


def test_corruption_depends_on_its_generator_alone():
    batch, schedule, t = wide_batch(), get_schedule("linear"), torch.full((4,), 0.5)
    before = batch.clean.clone()
    first = corrupt(batch, t, schedule, MASK, generator(3, "outer_mask", 7))
    torch.rand(10)  # the global generator plays no part
    again = corrupt(batch, t, schedule, MASK, generator(3, "outer_mask", 7))
    other = corrupt(batch, t, schedule, MASK, generator(3, "outer_mask", 8))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert torch.equal(batch.clean, before)


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    corrupt(wide_batch(), torch.full((4,), 0.5), get_schedule("linear"), MASK, draws())
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_more_gives_a_superset_with_the_asked_counts():
    batch = wide_batch(length=1020)
    masked = corrupt(batch, torch.full((4,), 0.4), get_schedule("linear"), MASK, draws()).masked
    count = torch.tensor([int(masked[0].sum()), 15, 20, 12]).maximum(masked.sum(dim=1))
    more = mask_more(masked, batch.maskable, count, draws(1))
    assert torch.equal(more & masked, masked)
    assert not (more & ~batch.maskable).any()
    assert torch.equal(more.sum(dim=1), count)
    assert torch.equal(more[0], masked[0])


def test_reveal_gives_a_subset_with_the_asked_counts():
    masked = torch.rand(4, 30, generator=draws()) < 0.6
    count = torch.tensor([0, 1, 7, int(masked[3].sum())])
    fewer = reveal(masked, count, draws(1))
    assert not (fewer & ~masked).any()
    assert torch.equal(fewer.sum(dim=1), count)


def test_the_random_subset_is_uniform():
    masked = torch.ones(5000, 6, dtype=torch.bool)
    share = reveal(masked, torch.full((5000,), 2), draws()).float().mean(dim=0)
    torch.testing.assert_close(share, torch.full((6,), 2 / 6), rtol=0, atol=0.03)
