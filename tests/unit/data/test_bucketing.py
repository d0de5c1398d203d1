"""Steps of rows of one length: padding, randomness, and one order for any number of processes."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from memdlm.data.bucketing import LengthBuckets, bucketed_order, padding_shares
from memdlm.seeding import generator
from memdlm.training.config import MemDLMConfig
from memdlm.training.row_order import SeededOrder, ordered, step_size


def long_alpaca_lengths(num_rows: int = 12_000, window: int = 4096) -> list[int]:
    """Lengths like LongAlpaca's: three quarters long documents, the rest short instructions."""
    draws = np.random.default_rng(0)
    num_long = num_rows * 3 // 4
    long = np.exp(draws.normal(np.log(8000), 0.55, num_long))
    short = np.exp(draws.normal(np.log(160), 0.8, num_rows - num_long))
    lengths = np.concatenate([long, short]).astype(int).clip(16)
    draws.shuffle(lengths)
    return [int(length) for length in lengths if length <= window]


def order(lengths: list[int], size: int, seed: int = 0) -> list[int]:
    return bucketed_order(lengths, size, generator(seed, "row_order", 0))


@pytest.mark.parametrize(("step", "batch"), [(2, 2), (16, 2), (8, 8), (128, 4), (128, 8)])
def test_no_step_has_ten_percent_padding(step, batch) -> None:
    lengths = long_alpaca_lengths()
    for seed in range(3):
        rows = order(lengths, step, seed)
        assert sorted(rows) == list(range(len(lengths)))
        assert max(padding_shares(rows, lengths, step, batch)) < 0.10


def test_what_it_is_for_megabatches_leave_steps_with_far_more() -> None:
    lengths = long_alpaca_lengths()
    sampler = LengthGroupedSampler(2, lengths=lengths, generator=torch.Generator().manual_seed(0))
    assert max(padding_shares(list(sampler), lengths, 2)) > 0.15
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    assert np.mean(padding_shares(shuffled, lengths, 2)) > 0.25


def test_steps_differ_from_pass_to_pass_and_the_longest_row_comes_first() -> None:
    lengths = long_alpaca_lengths()
    passes = [order(lengths, 8, seed) for seed in range(2)]
    sets = [{frozenset(rows[i : i + 8]) for i in range(0, len(rows), 8)} for rows in passes]
    assert len(sets[0] & sets[1]) < 0.05 * len(sets[0])
    assert all(lengths[rows[0]] == max(lengths) for rows in passes)
    assert passes[0] == order(lengths, 8, 0)
    means = [np.mean([lengths[i] for i in passes[0][j : j + 8]]) for j in range(0, 3000, 8)]
    assert abs(np.corrcoef(means[1:-1], means[2:])[0, 1]) < 0.2, "steps go from long to short"


@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
def test_a_step_that_is_not_full_comes_last(num_rows) -> None:
    lengths = [10 * (i + 1) for i in range(num_rows)]
    seen = [order(lengths, 4, seed) for seed in range(20)]
    assert all(sorted(rows) == list(range(num_rows)) for rows in seen)
    if num_rows == 9:
        assert len({rows[-1] for rows in seen}) > 1, "always the same row is left over"


class Settings:
    """What `ordered` reads of MemDLMConfig, for a world that this process is not part of."""

    def __init__(self, world_size: int, grouping: str, step: int) -> None:
        self.train_batch_size, self.length_grouping = 2, grouping
        self.gradient_accumulation_steps = step // (2 * world_size)
        self.world_size, self.seed, self.data_seed = world_size, 7, None


def ranks(world_size: int, grouping: str, lengths: list[int], step: int, epoch: int) -> Any:
    """Return each rank's batches, cut by accelerate as it cuts them for the Trainer."""
    shards = []
    for rank in range(world_size):
        settings: Any = Settings(world_size, grouping, step)
        assert step_size(settings) == step
        # What the Trainer makes of group_by_length: the rows of one process.
        local = settings.train_batch_size * settings.gradient_accumulation_steps
        sampler = ordered(LengthGroupedSampler(local, lengths=lengths), settings, lambda: epoch)
        assert isinstance(sampler, SeededOrder)
        batches = BatchSampler(sampler, settings.train_batch_size, drop_last=False)
        shards.append(list(BatchSamplerShard(batches, world_size, rank)))
    return shards


@pytest.mark.parametrize("grouping", ["megabatches", "buckets"])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("num_rows", [64, 150])
def test_ranks_together_see_the_same_steps_whatever_their_number(grouping, epoch, num_rows) -> None:
    draws = np.random.default_rng(num_rows)
    lengths = [int(n) for n in draws.integers(5, 500, num_rows)]
    step = 16
    steps = {}
    for world_size in (1, 2, 4):
        shards = ranks(world_size, grouping, lengths, step, epoch)
        per_step = step // (2 * world_size)
        steps[world_size] = [
            [
                row
                for micro in range(start, start + per_step)
                for shard in shards
                for row in shard[micro]
            ]
            for start in range(0, num_rows // step * per_step, per_step)
        ]
    assert len(steps[1]) == num_rows // step
    assert steps[1] == steps[2] == steps[4]
    rows = [row for step_rows in steps[1] for row in step_rows]
    assert len(set(rows)) == len(rows)


def test_the_setting_chooses_the_sampler() -> None:
    args = MemDLMConfig("runs/x", length_grouping="buckets", use_cpu=True)
    sampler = ordered(LengthGroupedSampler(2, lengths=[3, 4, 5]), args, lambda: 0)
    assert isinstance(sampler.sampler, LengthBuckets)
    assert sorted(sampler) == [0, 1, 2]
