"""The bound on the likelihood against its definition, mask by mask."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memdlm.errors import ConfigError, DataError, NonFiniteError, UsageError
from memdlm.evaluation.harness.likelihood import (
    LikelihoodConfig,
    draw_masks,
    likelihood_bounds,
)
from memdlm.memory.parametric_memory import ParametricMemory
from tests.conftest import make_model
from tests.families import MASK, PAD
from tests.unit.evaluation.harness.asking import MEMORY


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, PAD, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def enumerate_bound(model: nn.Module, context: torch.Tensor, continuation: torch.Tensor) -> float:
    """Return the expectation itself, from one plain forward per mask."""
    length = len(continuation)
    total = 0.0
    for count in range(1, length + 1):
        losses = []
        for hidden in itertools.combinations(range(length), count):
            noisy = torch.cat([context, continuation])
            places = torch.tensor(hidden) + len(context)
            noisy[places] = MASK
            logits = model(noisy[None]).logits[0].log_softmax(-1)
            losses.append(-logits[places, continuation[list(hidden)]].sum().item())
        total += length / count * sum(losses) / len(losses) / length
    return -total


def test_a_single_token_is_scored_exactly_by_one_forward(family) -> None:
    model = make_model(family).eval()
    context, token = tokens(7), tokens(1, seed=3)
    noisy = torch.cat([context, torch.tensor([MASK])])
    expected = model(noisy[None]).logits[0, -1].log_softmax(-1)[token.item()].item()
    (bound,) = likelihood_bounds(model, [context], [token])
    assert bound.value == pytest.approx(expected, abs=1e-5)
    assert (bound.standard_error, bound.num_masks) == (0.0, 1)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_few_masks_are_all_scored_and_the_bound_is_exact(family, length) -> None:
    model = make_model(family).eval()
    context, continuation = tokens(6), tokens(length, seed=2)
    (bound,) = likelihood_bounds(model, [context], [continuation])
    assert bound.value == pytest.approx(enumerate_bound(model, context, continuation), abs=1e-4)
    assert (bound.standard_error, bound.num_masks) == (0.0, 2**length - 1)


def test_draws_are_unbiased_and_their_standard_error_is_right() -> None:
    model = make_model().eval()
    context, continuation = tokens(5), tokens(6, seed=4)
    exact = enumerate_bound(model, context, continuation)
    config, repeats = LikelihoodConfig(num_samples=16), 200
    bounds = likelihood_bounds(
        model, [context] * repeats, [continuation] * repeats, config, seeds=range(repeats)
    )
    values = torch.tensor([bound.value for bound in bounds], dtype=torch.float64)
    spread = values.std().item()
    assert {bound.num_masks for bound in bounds} == {16}
    assert abs(values.mean().item() - exact) < 4 * spread / math.sqrt(repeats)
    stated = math.sqrt(sum(bound.standard_error**2 for bound in bounds) / repeats)
    # The standard deviation of 200 values is known to some 5 percent.
    assert stated == pytest.approx(spread, rel=0.2)


def test_strata_cover_the_numbers_of_masked_tokens_evenly() -> None:
    drawn = draw_masks(64, 128, seed=0)
    counts = drawn.masks.sum(dim=1)
    assert not drawn.is_exact
    assert torch.equal(counts, torch.arange(64).repeat_interleave(2) + 1)
    places = torch.stack([draw_masks(20, 128, seed).masks.double().mean(0) for seed in range(50)])
    # Each token is masked in (L + 1) / 2 L of all draws.
    assert torch.allclose(places.mean(0), torch.tensor(21 / 40, dtype=torch.float64), atol=0.02)


def test_a_scripted_model_gives_the_known_bound() -> None:
    model = make_model()
    loss = 0.75

    def forward(input_ids, attention_mask, positions, valid, scored):
        assert (input_ids.gather(1, positions).flatten()[valid] == MASK).all()
        return SimpleNamespace(nll=torch.full((len(valid),), loss))

    model.forward = forward
    # L / l * l * loss, whatever is masked.
    bounds = likelihood_bounds(model, [tokens(4)] * 2, [tokens(3), tokens(30)])
    assert [bound.value for bound in bounds] == pytest.approx([-3 * loss, -30 * loss])
    assert [bound.standard_error for bound in bounds] == pytest.approx([0.0, 0.0])
    model.forward = lambda *args, valid, **rest: SimpleNamespace(nll=valid / 0.0)
    with pytest.raises(NonFiniteError, match="losses are nan or inf"):
        likelihood_bounds(model, [tokens(4)], [tokens(3)])


def test_bounds_do_not_depend_on_their_company_and_the_model_stays_as_it_was() -> None:
    model = make_model().train()
    contexts = [tokens(n, seed=n) for n in (3, 11, 6)]
    continuations = [tokens(n, seed=n) for n in (9, 2, 14)]
    config = LikelihoodConfig(num_samples=10, batch_size=7)
    together = likelihood_bounds(model, contexts, continuations, config, seeds=[4, 5, 6])
    assert model.training
    for row, seed in enumerate([4, 5, 6]):
        (alone,) = likelihood_bounds(
            model, contexts[row : row + 1], continuations[row : row + 1], config, seeds=[seed]
        )
        assert alone.value == pytest.approx(together[row].value, abs=1e-4)
    (empty,) = likelihood_bounds(model, [tokens(0)], [tokens(2)])
    assert math.isfinite(empty.value)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_row_is_scored_with_its_own_memory(batch_size) -> None:
    model = make_model().eval()
    contexts = [tokens(n, seed=n) for n in (8, 8, 5)]
    continuations = [tokens(3, seed=n) for n in (1, 2, 3)]
    memories = []
    for seed, context in enumerate(contexts[:2]):
        memory = ParametricMemory(model, MEMORY)
        memory.write(context[None], seed=seed)
        memories.append(memory)
    given = [*memories, None]
    expected = []
    for memory, context, continuation in zip(given, contexts, continuations, strict=True):
        if memory is None:
            expected.append(enumerate_bound(model, context, continuation))
        else:
            with memory.attached():
                expected.append(enumerate_bound(model, context, continuation))
    config = LikelihoodConfig(batch_size=batch_size)
    bounds = likelihood_bounds(model, contexts, continuations, config, memories=given)
    assert [bound.value for bound in bounds] == pytest.approx(expected, abs=1e-4)
    plain = likelihood_bounds(model, contexts, continuations, config)
    assert abs(plain[0].value - bounds[0].value) > 1e-3


def test_bad_arguments_are_named() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"likelihood.num_samples: 3 .* an even number"):
        LikelihoodConfig(num_samples=3)
    with pytest.raises(ConfigError, match=r"likelihood.batch_size: 0"):
        LikelihoodConfig(batch_size=0)
    with pytest.raises(DataError, match="continuation 2 is empty"):
        likelihood_bounds(model, [tokens(3)] * 2, [tokens(3), tokens(0)])
    with pytest.raises(DataError, match=r"continuation 1 has 5 .* 65, .* context is 64 tokens"):
        likelihood_bounds(model, [tokens(60)], [tokens(5)])
    with pytest.raises(UsageError, match="seeds: 1 for 2 continuations"):
        likelihood_bounds(model, [tokens(3)] * 2, [tokens(3)] * 2, seeds=[1])
