"""Prompts longer than one chunk, seeds per row, and writing on in a memory."""

import pytest
import torch

from memdlm import MemoryConfig, ParametricMemory
from memdlm.errors import ConfigError, UsageError
from memdlm.memory.budget import memory_bytes, rows_within
from memdlm.memory.prompt import chunk_sizes, plan_rounds

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5}
IDS = torch.randint(0, 59, (3, 40), generator=torch.Generator().manual_seed(1))


def written(model, ids, mask=None, *, seed=0, **changes) -> ParametricMemory:
    memory = ParametricMemory(model, MemoryConfig(**{**SMALL, **changes}))
    memory.write(ids, mask, seed=seed)
    return memory


def assert_equal(first, second, tolerance=0.0) -> None:
    for name, tensor in first.fast_weights.tensors.items():
        other = second.fast_weights.tensors[name]
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("num_tokens", "length", "sizes"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (40, 16, [14, 13, 13]), (3, 1, [1, 1, 1])],
)
def test_chunks_are_few_and_of_nearly_one_length(num_tokens, length, sizes) -> None:
    assert chunk_sizes(num_tokens, length) == sizes


def test_a_batch_that_fits_is_one_round_as_it_was_given() -> None:
    mask = torch.ones_like(IDS)
    (whole,) = plan_rounds(IDS, mask, 40)
    assert torch.equal(whole.input_ids, IDS) and torch.equal(whole.attention_mask, mask)
    assert whole.rows == (0, 1, 2)


def test_rounds_hold_every_token_once_and_in_order() -> None:
    mask = (torch.arange(40) < torch.tensor([40, 7, 21])[:, None]).long()
    rounds = plan_rounds(IDS, mask, 16)
    assert [chunk.rows for chunk in rounds] == [(0, 1, 2), (0, 2), (0,)]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in rounds:
        mask_of = chunk.attention_mask
        real = torch.ones_like(chunk.input_ids) if mask_of is None else mask_of
        for row, ids, is_real in zip(chunk.rows, chunk.input_ids, real.bool(), strict=True):
            seen[row] += ids[is_real].tolist()
    assert [seen[row] for row in range(3)] == [
        row[real.bool()].tolist() for row, real in zip(IDS, mask, strict=True)
    ]


def test_chunks_are_written_one_after_the_other_into_one_memory(family, build_model) -> None:
    model = build_model(family)
    memory = written(model, IDS[:1], chunk_length=16)
    by_hand = written(model, IDS[:1, :14])
    by_hand.write(IDS[:1, 14:27], extend=True)
    by_hand.write(IDS[:1, 27:], extend=True)
    assert_equal(memory, by_hand)
    assert memory.stats.losses.shape == (6, 1)
    assert (memory.rows[0].num_chunks, memory.rows[0].num_tokens) == (3, 40)
    assert [prompt.num_tokens for prompt in by_hand.rows[0].prompts] == [14, 13, 13]
    # Chunks draw masks of their own: the same text again is not the same step again.
    again = written(model, IDS[:1, :14])
    first = again.stats.losses[0]
    again.erase()
    again.write(IDS[:1, :14])
    assert torch.equal(again.stats.losses[0], first)
    again.fast_weights.drop(torch.tensor([False]))
    again.write(IDS[:1, :14], extend=True)
    assert not torch.equal(again.stats.losses[0], first)


def test_rows_of_different_numbers_of_chunks_are_as_alone(family, build_model) -> None:
    model = build_model(family)
    lengths = (40, 7, 21)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    together = written(model, IDS, mask, chunk_length=16)
    for row, length in enumerate(lengths):
        alone = written(model, IDS[row, None, :length], chunk_length=16)
        assert_equal(together.row(row), alone, tolerance=1e-6)
        steps = together.stats.losses[:, row]
        steps = steps[~steps.isnan()]
        torch.testing.assert_close(steps, alone.stats.losses[:, 0], rtol=1e-5, atol=0)
    assert together.stats.alive.all()


def test_the_context_is_the_default_chunk_and_its_limit(build_model) -> None:
    model = build_model("llada", max_sequence_length=16)
    assert_equal(written(model, IDS), written(model, IDS, chunk_length=16))
    with pytest.raises(ConfigError, match="chunk_length: 17 exceeds the model's context of 16"):
        written(model, IDS, chunk_length=17)
    with pytest.raises(ConfigError, match=r"memory\.chunk_length: 0 is out of range"):
        MemoryConfig(chunk_length=0)


def test_a_row_that_met_inf_in_one_chunk_stays_dropped(build_model) -> None:
    model = build_model("llada")
    wild = {"learning_rate": 1e38, "clip_norm": None, "num_epochs": 3}
    memory = written(model, IDS, chunk_length=16, **wild)
    assert not memory.stats.alive.any()
    assert all(row.is_dropped for row in memory.rows)
    memory.config = MemoryConfig(**SMALL)
    memory.write(IDS[:, :5], extend=True)
    assert all(row.is_dropped for row in memory.rows)
    assert (memory.fast_weights.delta_norm() == 0).all()


def test_every_row_may_have_its_own_seed(family, build_model) -> None:
    model = build_model(family)
    ids = IDS[:1, :12].repeat(3, 1)
    together = written(model, ids, seed=[4, 0, 4])
    for row, seed in enumerate((4, 0, 4)):
        alone = written(model, ids[:1], seed=seed)
        assert_equal(together.row(row), alone, tolerance=1e-6)
        assert together.rows[row].seed == seed
    with pytest.raises(UsageError, match="seed: 2 seeds for 3 memories"):
        written(model, ids, seed=[1, 2])


def test_only_what_was_written_can_be_extended(build_model) -> None:
    model = build_model("llada")
    memory = ParametricMemory(model, MemoryConfig(**SMALL))
    with pytest.raises(UsageError, match="no memory to extend"):
        memory.write(IDS[:1, :9], extend=True)
    memory.write(IDS[:1, :9])
    before = memory.fast_weights
    with pytest.raises(UsageError, match="1 rows and cannot be extended by 3"):
        memory.write(IDS[:, :9], extend=True)
    with pytest.raises(IndexError):
        memory.write(torch.full((1, 4), 10_000), extend=True)
    assert memory.fast_weights is before  # what fails changes nothing


def test_the_budget_counts_every_byte(family, build_model) -> None:
    model = build_model(family)
    memory = written(model, IDS[:, :9])
    one = memory_bytes(memory.placement, memory.config)
    assert memory.num_bytes == 3 * one
    assert rows_within(one, one) == 1 and rows_within(5 * one - 1, one) == 4
    with pytest.raises(ConfigError, match="max_memory_bytes: one memory needs"):
        rows_within(one - 1, one)
