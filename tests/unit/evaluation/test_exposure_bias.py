"""Exposure bias against figures worked by hand, on a network with scripted logits."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memdlm.errors import DataError
from memdlm.evaluation.exposure_bias import ExposureBias, measure_exposure_bias
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


def test_figures_do_not_depend_on_the_batch(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("llada", 0)
    prompts = [torch.arange(3, 3 + n) for n in (4, 6, 5)]
    responses = [torch.arange(20, 20 + n) for n in (3, 4, 2)]
    memory = MemoryConfig(layer_fraction=0.3)
    for config in (None, memory):
        together, alone = (
            measure_exposure_bias(model, prompts, responses, memory=config, batch_size=size)
            for size in (3, 1)
        )
        assert together.static_nll == pytest.approx(alone.static_nll, rel=1e-5)
        assert together.sequential_nll == pytest.approx(alone.sequential_nll, rel=1e-5)


def test_memory_changes_the_figures_and_is_gone_afterwards(
    build_model: Callable[..., nn.Module],
) -> None:
    model = build_model("llada_moe", 0).train()
    ids = torch.arange(3, 15)[None]
    before = model.eval()(ids).logits
    model.train()
    arguments = (model, [torch.arange(3, 9)], [torch.arange(20, 24)])
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
