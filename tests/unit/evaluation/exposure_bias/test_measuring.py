"""Exposure bias against figures worked by hand, on a network with scripted logits."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memdlm.errors import DataError, UsageError
from memdlm.evaluation.exposure_bias.measuring import measure_bias_sums, measure_exposure_bias
from memdlm.evaluation.exposure_bias.results import (
    BiasSums,
    ExposureBias,
    curve_record,
    pair_records,
)
from memdlm.memory.config import MemoryConfig

VOCAB, EOS, MASK = 8, 0, 7
PROMPTS = [torch.tensor([1, 2]), torch.tensor([3, 2])]
RESPONSES = [torch.tensor([4, 5, 6, EOS]), torch.tensor([5, 4, 6, EOS])]


class Scripted(nn.Module):
    """Gives the clean token `right` of the probability, less for every visible wrong token."""

    def __init__(
        self, answers: dict[int, list[int]], right: float, wrong_costs: float = 1.0
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.answers, self.right, self.wrong_costs = answers, right, wrong_costs
        self.config = SimpleNamespace(
            mask_token_id=MASK, pad_token_id=EOS, eos_token_id=EOS, max_position_embeddings=64
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor
    ) -> object:
        logits = torch.zeros(*positions.shape, VOCAB)
        for row, ids in enumerate(input_ids):
            clean = torch.tensor(self.answers[int(ids[0])])
            seen = ids[positions[row]]
            wrong = int(((seen != MASK) & (seen != clean)).sum())
            p = self.right * self.wrong_costs**wrong
            logits[row] = math.log((1 - p) / (VOCAB - 1))
            logits[row, torch.arange(len(clean)), clean] = math.log(p)
        return SimpleNamespace(logits=logits)


ANSWERS = {1: RESPONSES[0].tolist(), 3: RESPONSES[1].tolist()}


def test_a_model_that_is_always_right_has_no_exposure_bias() -> None:
    bias = measure_exposure_bias(Scripted(ANSWERS, right=0.9), PROMPTS, RESPONSES)
    assert bias.mask_ratio == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert bias.static_nll == pytest.approx((-math.log(0.9),) * 4, rel=1e-5)
    assert bias.ratios == pytest.approx((1.0,) * 4)
    assert bias.overall_ratio == pytest.approx(1.0)
    assert bias.num_tokens == (8, 6, 4, 2)


def test_every_own_mistake_costs_in_the_sequential_likelihood_only() -> None:
    # Below 1/7 of the probability another token is chosen, so every committed token is wrong.
    bias = measure_exposure_bias(Scripted(ANSWERS, right=0.1, wrong_costs=0.5), PROMPTS, RESPONSES)
    assert bias.static_nll == pytest.approx((-math.log(0.1),) * 4, rel=1e-5)
    expected = [-math.log(0.1 * 0.5**mistakes) for mistakes in range(4)]
    assert bias.sequential_nll == pytest.approx(expected, rel=1e-5)
    scored = sum(w * x for w, x in zip((6, 4, 2), expected[1:], strict=True))
    assert bias.overall_ratio == pytest.approx(scored / (12 * -math.log(0.1)), rel=1e-5)


def test_padding_of_short_responses_is_not_scored() -> None:
    responses = [RESPONSES[0], torch.tensor([5, EOS])]
    answers = {1: RESPONSES[0].tolist(), 3: [5, EOS, EOS, EOS]}
    bias = measure_exposure_bias(Scripted(answers, right=0.9), PROMPTS, responses)
    assert bias.num_tokens[0] == 6  # four and two, without the two that only fill
    assert bias.mask_ratio[0] == 1.0


def test_fewer_steps_than_tokens() -> None:
    bias = measure_exposure_bias(Scripted(ANSWERS, right=0.9), PROMPTS, RESPONSES, num_steps=2)
    assert bias.mask_ratio == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize("memory", [None, MemoryConfig(layer_fraction=0.3)])
def test_figures_do_not_depend_on_the_batch(
    build_model: Callable[..., nn.Module], family: str, memory: MemoryConfig | None
) -> None:
    model = build_model(family, 0)
    draws = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 50, (5 + i % 7,), generator=draws) for i in range(17)]
    responses = [torch.randint(3, 50, (2 + i % 4,), generator=draws) for i in range(17)]
    together, alone, other = (
        measure_bias_sums(model, prompts, responses, memory=memory, seed=seed, batch_size=size)
        for size, seed in ((16, 0), (1, 0), (16, 1))
    )
    assert together.mask_ratio == alone.mask_ratio
    assert np.array_equal(together.num_tokens, alone.num_tokens)
    for name in ("static_nll", "sequential_nll"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-4)
        assert not np.allclose(getattr(together, name), getattr(other, name), rtol=1e-3)


def test_orders_and_masks_depend_on_the_sample_and_not_on_the_model(
    build_model: Callable[..., nn.Module],
) -> None:
    prompts = [torch.arange(3, 9), torch.arange(5, 9), torch.arange(3, 9)]
    responses = [torch.arange(20, 26), torch.arange(30, 34), torch.arange(20, 26)]

    def masks(model: nn.Module, batch_size: int) -> list[list[list[int]]]:
        """Return which slots were masked in every clean context, by sample and step."""
        seen: list[list[list[int]]] = [[] for _ in prompts]
        calls: list[tuple[Tensor, Tensor]] = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args[0], kwargs["positions"])),
            with_kwargs=True,
        )
        measure_bias_sums(model, prompts, responses, num_steps=4, batch_size=batch_size)
        handle.remove()
        # A batch of 4 steps is 4 calls of the decode, then those in clean context.
        for batch in range(0, len(calls), 8):
            first = batch // 8 * batch_size
            for ids, positions in calls[batch + 4 : batch + 8]:
                for row, masked in enumerate((ids.gather(1, positions) == MASK_ID).tolist()):
                    seen[first + row].append(masked)
        return seen

    MASK_ID = build_model("llada", 0).config.mask_token_id
    one = masks(build_model("llada", 0), 3)
    assert [len(steps) for steps in one] == [4, 4, 4]
    assert [sum(masked) for masked in one[0]] == [6, 4, 2, 1]
    assert one == masks(build_model("llada", 1), 3) == masks(build_model("dream", 0), 1)
    assert one[0] != one[2]  # the same texts in another place have an order of their own


def test_memory_changes_the_figures_and_is_gone_afterwards(
    build_model: Callable[..., nn.Module],
) -> None:
    model = build_model("llada_moe", 0).train()
    ids = torch.arange(3, 15)[None]
    before = model.eval()(ids).logits
    model.train()
    # Long enough that some of its tokens are masked and there is something to learn.
    arguments = (model, [torch.arange(3, 33)], [torch.arange(20, 24)])
    plain = measure_exposure_bias(*arguments)
    strong = MemoryConfig(layer_fraction=0.5, learning_rate=5.0, clip_norm=None)
    with_memory = measure_exposure_bias(*arguments, memory=strong)
    assert with_memory.static_nll != pytest.approx(plain.static_nll, rel=1e-4)
    assert model.training
    assert torch.equal(model.eval()(ids).logits, before)


def test_off_is_no_memory(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("llada", 0)
    arguments = (model, [torch.arange(3, 9)], [torch.arange(20, 24)])
    off = measure_exposure_bias(*arguments, memory=MemoryConfig(enabled=False))
    assert off == measure_exposure_bias(*arguments)


def test_missing_responses_are_an_error() -> None:
    with pytest.raises(DataError, match="one response per prompt, got 2 and 1"):
        measure_exposure_bias(Scripted(ANSWERS, right=0.9), PROMPTS, RESPONSES[:1])


def test_overall_ratio_leaves_the_first_step_out() -> None:
    bias = ExposureBias((1.0, 0.5), (1.0, 1.0), (1.0, 3.0), (100, 1))
    assert bias.overall_ratio == pytest.approx(3.0)


def test_samples_keep_their_own_sums() -> None:
    # The second answer stops after two tokens; of its filling nothing is scored.
    responses = [RESPONSES[0], torch.tensor([5, EOS])]
    answers = {1: RESPONSES[0].tolist(), 3: [5, EOS, EOS, EOS]}
    sums = measure_bias_sums(Scripted(answers, right=0.9), PROMPTS, responses)
    assert sums.static_nll.shape == sums.sequential_nll.shape == (2, 4)
    assert sums.num_tokens[0].tolist() == [4, 3, 2, 1]
    assert sums.num_tokens[1, 0] == 2
    assert sums.static_nll == pytest.approx(-math.log(0.9) * sums.num_tokens, rel=1e-5)


def made_up(sequential: list[list[float]], static: list[list[float]]) -> BiasSums:
    """Return sums of two steps with one token each."""
    tokens = np.ones((len(static), 2), dtype=np.int64)
    return BiasSums((1.0, 0.5), np.array(static), np.array(sequential), tokens)


def test_intervals_resample_samples_and_not_tokens() -> None:
    # Equal samples: whatever is drawn, the ratio is theirs.
    record = curve_record(made_up([[1, 6]] * 3, [[1, 2]] * 3), num_resamples=50, seed=0)
    assert record["ratio"] == [1.0, 3.0]
    assert record["ratio_low"] == pytest.approx([1.0, 3.0])
    assert record["ratio_high"] == pytest.approx([1.0, 3.0])
    assert record["overall"] == pytest.approx({"value": 3.0, "low": 3.0, "high": 3.0})
    assert record["samples"]["sequential_nll"] == [6.0, 6.0, 6.0]
    # Two unlike samples: a resample holds 2, 1 or 0 of the second, in 1/4, 1/2 and 1/4 of draws.
    unlike = made_up([[1, 1], [1, 9]], [[1, 1], [1, 1]])
    record = curve_record(unlike, num_resamples=2000, seed=0)
    assert record["overall"] == pytest.approx({"value": 5.0, "low": 1.0, "high": 9.0})
    assert record == curve_record(unlike, num_resamples=2000, seed=0)


def test_arms_are_drawn_together() -> None:
    low = made_up([[1, 1], [1, 9]], [[1, 1], [1, 1]])
    high = made_up([[1, 2], [1, 10]], [[1, 1], [1, 1]])
    (pair,) = pair_records(["low", "high"], [low, high], num_resamples=2000, seed=0)
    # Each varies from 1 to 9 and more; on the same samples they always differ by 1.
    assert pair == {
        "first": "low",
        "second": "high",
        "difference": pytest.approx(1.0),
        "low": pytest.approx(1.0),
        "high": pytest.approx(1.0),
    }
    with pytest.raises(UsageError, match="different samples"):
        pair_records(["a", "b"], [low, made_up([[1, 1]], [[1, 1]])], num_resamples=9, seed=0)


def test_a_step_without_a_scored_token_has_no_ratio() -> None:
    sums = made_up([[1, 0]], [[1, 0]])
    sums.num_tokens[0, 1] = 0
    record = curve_record(sums, num_resamples=20, seed=0)
    assert record["ratio"] == [1.0, None]
    assert record["ratio_low"][1] is record["ratio_high"][1] is None


def test_an_impossible_batch_is_an_error() -> None:
    with pytest.raises(UsageError, match="batch_size: 0"):
        measure_bias_sums(Scripted(ANSWERS, right=0.9), PROMPTS, RESPONSES, batch_size=0)
