"""Standard errors, bootstrap and paired tests: by hand, and against scipy."""

from fractions import Fraction
from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from memdlm.errors import UsageError
from memdlm.uncertainty import (
    Estimate,
    bootstrap_interval,
    bootstrap_means,
    exact_sign_test,
    mean_and_standard_error,
    over_seeds,
    over_strata,
    paired_test,
    percentile_interval,
    sign_flip_test,
)


def graded(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(0.5 + shift, 0.2, count), 0, 1)


def test_mean_and_standard_error_by_hand() -> None:
    estimate = mean_and_standard_error([1, 0, 1, 1])
    # Variance (3 * (1/4)^2 + (3/4)^2) / 3 = 1/4, so se = sqrt(1/4 / 4) = 1/4.
    assert estimate == Estimate(0.75, 0.25, 4)
    assert mean_and_standard_error([0.3]) == Estimate(0.3, None, 1)
    values = graded(57, 0)
    assert mean_and_standard_error(values).standard_error == pytest.approx(stats.sem(values))


def test_a_group_counts_every_member_the_same() -> None:
    members = [Estimate(1.0, 0.3, 10), Estimate(0.0, 0.4, 90)]
    combined = over_strata(members)
    assert combined == Estimate(0.5, pytest.approx(0.25), 100)  # sqrt(0.09 + 0.16) / 2
    assert over_strata([*members, Estimate(0.5, None, 1)]).standard_error is None


def test_several_seeds_give_the_error_over_seeds_and_one_that_over_samples() -> None:
    seeds = [mean_and_standard_error(x) for x in ([0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1])]
    combined = over_seeds(seeds)
    means = [0.75, 0.5, 1.0]
    assert combined == Estimate(0.75, pytest.approx(stats.sem(means)), 12, "seeds", 3)
    assert combined.standard_error == pytest.approx(0.25 / sqrt(3))
    assert over_seeds(seeds[:1]) == seeds[0]
    assert seeds[0].over == "samples"


def test_the_bootstrap_agrees_with_scipy_and_is_seeded() -> None:
    values = graded(80, 1)
    interval = bootstrap_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=3).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert bootstrap_interval(values) == interval
    assert bootstrap_interval(values, seed=1) != interval
    wide = bootstrap_interval(values, confidence=0.999)
    assert wide.low < interval.low < values.mean() < interval.high < wide.high


def test_resampling_two_values_gives_the_binomial_distribution() -> None:
    means = bootstrap_means([0, 1], num_resamples=40_000)
    shares = [(means == level).mean() for level in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    interval = percentile_interval([0, 1, 2, 3, 4], 0.5)
    assert (interval.low, interval.high) == (1, 3)


def test_resampling_keeps_within_strata_which_count_the_same() -> None:
    # Each stratum is constant, so nothing can vary as long as no sample changes sides.
    means = bootstrap_means([1, 0, 0, 0], strata=["a", "b", "b", "b"], num_resamples=50)
    assert set(means) == {0.5}


def test_values_of_one_sample_stay_together() -> None:
    pairs = np.stack([graded(30, 2), 2 * graded(30, 2)], axis=1)
    means = bootstrap_means(pairs, num_resamples=100)
    assert means.shape == (100, 2)
    assert means[:, 1] / means[:, 0] == pytest.approx(np.full(100, 2.0))


def test_draws_in_parts_are_the_draws_at_once(monkeypatch) -> None:
    values = graded(40, 3)
    whole = bootstrap_means(values), sign_flip_test(values - 0.5)
    monkeypatch.setattr("memdlm.uncertainty._DRAWS_AT_ONCE", 40 * 2)
    parts = bootstrap_means(values, num_resamples=500)
    assert parts == pytest.approx(whole[0][:500])
    assert 0 < sign_flip_test(values - 0.5) <= 1


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (1, 9), (8, 8), (40, 21), (900, 3)])
def test_the_sign_test_agrees_with_scipy(better: int, worse: int) -> None:
    count = better + worse
    theirs = stats.binomtest(better, count).pvalue if count else 1.0
    assert exact_sign_test(better, worse) == pytest.approx(theirs, rel=1e-9)


def test_the_sign_test_by_hand() -> None:
    # Five pairs differ, one against: 2 * (C(5,0) + C(5,1)) / 32.
    assert exact_sign_test(4, 1) == Fraction(12, 32)
    assert exact_sign_test(2500, 2400) == pytest.approx(stats.binomtest(2500, 4900).pvalue)


def test_few_differences_are_flipped_in_every_way() -> None:
    differences = [0.5, 0.25, -0.25, 0.0, 0.75]
    observed = abs(sum(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in
            product((1, -1), repeat=5)]  # fmt: skip
    by_hand = sum(abs(total) >= observed for total in sums) / len(sums)
    assert sign_flip_test(differences) == by_hand
    assert sign_flip_test([0.0, 0.0]) == 1.0
    # 0.1 + 0.2 is not 0.3 in binary: a tie must still count as one.
    assert sign_flip_test([0.1, 0.2, -0.3]) == 1.0


def test_many_differences_agree_with_scipy() -> None:
    a, b = graded(60, 4, shift=0.05), graded(60, 5)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", rng=1
    ).pvalue
    ours = sign_flip_test(a - b)
    assert 0.02 < theirs < 0.98
    assert ours == pytest.approx(theirs, abs=0.02)
    assert sign_flip_test(a - b) == ours
    assert sign_flip_test(np.ones(200)) == pytest.approx(1 / 10_001)


def test_a_paired_test_of_right_and_wrong_answers_is_mcnemars() -> None:
    first = [1] * 7 + [0] * 1 + [1] * 12 + [0] * 4
    second = [0] * 7 + [1] * 1 + [1] * 12 + [0] * 4
    test = paired_test(first, second)
    assert (test.method, test.num_better, test.num_worse, test.num_samples) == ("sign", 7, 1, 24)
    assert test.p_value == pytest.approx(stats.binomtest(7, 8).pvalue)
    assert test.difference == pytest.approx(6 / 24)
    assert test.interval.low < test.difference < test.interval.high
    back = paired_test(second, first)
    assert (back.difference, back.p_value) == (pytest.approx(-test.difference), test.p_value)


def test_a_paired_test_of_graded_scores_flips_signs() -> None:
    a, b = graded(50, 6, shift=0.1), graded(50, 7)
    test = paired_test(a, b)
    assert test.method == "sign flip"
    assert test.p_value == sign_flip_test(a - b)
    assert test.difference == pytest.approx(np.mean(a - b))
    same = paired_test(a, a)
    assert (same.difference, same.p_value, same.interval.low, same.interval.high) == (0, 1, 0, 0)


def test_p_values_of_equal_arms_are_uniform() -> None:
    draws = np.random.default_rng(0)
    p_values = [sign_flip_test(draws.normal(size=30), num_resamples=200) for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_strata_weigh_the_same_in_difference_and_test() -> None:
    # One pair of "a" gains 0.5, three of "b" lose 0.1: the mean of both means is 0.2.
    first, second = [0.6, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]
    test = paired_test(first, second, strata=["a", "b", "b", "b"])
    assert test.difference == pytest.approx(0.2)
    # |0.25 a - 0.05 (b1 + b2 + b3) / 3| >= 0.2 holds for every pattern.
    assert test.p_value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_and_standard_error([]), "there is no score"),
        (lambda: mean_and_standard_error([1, float("nan")]), "inf or nan"),
        (lambda: mean_and_standard_error([[1, 2]]), "one number per sample"),
        (lambda: over_strata([]), "at least one estimate"),
        (lambda: over_seeds([]), "at least one seed"),
        (lambda: bootstrap_means([1, 2], strata=["a"]), "one per sample"),
        (lambda: bootstrap_interval([1, 2], confidence=1), "between 0 and 1"),
        (lambda: paired_test([1, 2], [1]), "not the same samples"),
    ],
)
def test_what_cannot_be_told_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
