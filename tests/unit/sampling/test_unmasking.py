import json
import math
from pathlib import Path

import pytest
import torch

from memdlm.errors import ConfigError
from memdlm.sampling.token_choice import choose_tokens, keep_likely, row_draws, suppress
from memdlm.sampling.unmasking import UNMASKING_POLICIES, most_confident, transfer_schedule

FIXTURES = Path(__file__).parents[2] / "fixtures"


def no_draws():
    raise AssertionError("a greedy choice must not draw")


@pytest.fixture(scope="module")
def schedule_rows():
    return json.loads((FIXTURES / "schedule" / "transfer_schedule.json").read_text())["rows"]


def test_even_schedule_equals_the_official_one(schedule_rows):
    assert len(schedule_rows) == 330
    for row in schedule_rows:
        assert transfer_schedule(row["masked"], row["steps"]) == row["official"]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_scheduled_counts_equal_the_reference_without_zero_steps(schedule_rows, kind):
    for row in schedule_rows:
        counts = transfer_schedule(row["masked"], row["steps"], kind)
        assert [count for count in counts if count] == row[f"mdlm_{kind}"]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError):
        transfer_schedule(4, 2, "square")


def test_policies_on_numbers_worked_by_hand():
    probabilities = torch.tensor([[[0.5, 0.5, 0.0], [0.7, 0.2, 0.1]]])
    tokens = torch.tensor([[1, 2]])
    uniform = torch.tensor([[0.3, 0.9]])
    confidence = {
        name: policy(probabilities, tokens, lambda: uniform)[0].tolist()
        for name, policy in UNMASKING_POLICIES.items()
    }
    assert confidence["low_confidence"] == pytest.approx([0.5, 0.1])
    assert confidence["random"] == pytest.approx([0.3, 0.9])
    assert confidence["margin"] == pytest.approx([0.0, 0.5])
    second = 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)
    assert confidence["entropy"] == pytest.approx([math.log(0.5), second])


def test_only_masked_slots_are_chosen_and_ties_go_left():
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    masked = torch.tensor([[False, True, True, True], [True, True, False, False]])
    chosen = most_confident(confidence, masked, 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert most_confident(confidence, masked, 3)[1].tolist() == [True, True, False, False]


def test_every_row_has_its_own_count():
    confidence = torch.tensor([[0.1, 0.2, 0.3]] * 3)
    masked = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])
    chosen = most_confident(confidence, masked, torch.tensor([2, 0, 3]))
    assert chosen.tolist() == [[False, True, True], [False] * 3, [True, False, False]]


def kept(probabilities, temperature=0.0, top_k=None, top_p=None):
    logits = keep_likely(torch.tensor([[probabilities]]).log(), temperature, top_k, top_p)
    return logits[0, 0].isfinite().tolist()


def test_top_k_and_top_p_on_numbers_worked_by_hand():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    assert kept(probabilities, top_k=2) == [False, True, False, True]
    assert kept(probabilities, top_k=9) == [True] * 4
    assert kept(probabilities, top_p=0.49) == [False, True, False, False]
    assert kept(probabilities, top_p=0.51) == [False, True, False, True]
    assert kept(probabilities, top_p=0.76) == [False, True, True, True]
    assert kept(probabilities, top_p=1.0) == [True] * 4
    assert kept(probabilities, top_p=1e-9) == [False, True, False, False]
    # Of the two best, 2/3 and 1/3 of what is left, the first is enough.
    assert kept(probabilities, top_k=2, top_p=0.6) == [False, True, False, False]
    # Twice as hot, the best has 0.372 of it all and two are needed.
    assert kept(probabilities, temperature=2.0, top_p=0.49) == [False, True, False, True]
    # Ties with the last of the k stay.
    assert kept([0.4, 0.2, 0.2, 0.2], top_k=2) == [True] * 4


def test_greedy_choice_draws_nothing_and_never_takes_the_mask_token():
    logits = torch.tensor([[[0.0, 1.0, 5.0]]])
    assert choose_tokens(logits, 0.0, 2, no_draws).tolist() == [[1]]
    assert logits.tolist() == [[[0.0, 1.0, 5.0]]]


def test_gumbel_choice_follows_the_tempered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(1, 20_000, 4)
    draw = row_draws([0])
    for temperature in (0.5, 1.0):
        tokens = choose_tokens(
            logits, temperature, 3, lambda: draw(0, "token_choice", 0, (20_000, 4))[None]
        )
        shares = torch.bincount(tokens[0], minlength=4) / 20_000
        expected = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(0)
        # Five standard deviations of a share over 20,000 draws.
        torch.testing.assert_close(shares[:3], expected, atol=5 * 0.5 / 141, rtol=0)
        assert shares[3] == 0


def test_gumbel_choice_equals_the_official_formula():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    draw = row_draws([1, 2])
    uniform = torch.stack([draw(row, "token_choice", 0, (5, 7)) for row in range(2)])
    official = logits.double().exp() / (-torch.log(uniform)) ** 0.7
    official[..., 6] = 0
    assert torch.equal(choose_tokens(logits, 0.7, 6, lambda: uniform), official.argmax(-1))


def test_a_draw_depends_on_its_arguments_and_its_rows_seed_only():
    both, alone = row_draws([5, 6]), row_draws([6])
    state = torch.get_rng_state()
    first = both(1, "unmasking", 3, (4,))
    assert torch.equal(first, alone(0, "unmasking", 3, (4,)))
    assert torch.equal(first, both(1, "unmasking", 3, (4,)))
    assert not torch.equal(first, both(0, "unmasking", 3, (4,)))
    assert not torch.equal(first, both(1, "unmasking", 4, (4,)))
    assert not torch.equal(first, both(1, "token_choice", 3, (4,)))
    assert torch.equal(state, torch.get_rng_state())


def test_suppressed_tokens_have_no_probability():
    logits = torch.zeros(1, 1, 4)
    assert suppress(logits, (1, 3)).softmax(-1).tolist() == [[[0.5, 0.0, 0.5, 0.0]]]
    assert suppress(logits, ()) is logits
