"""How sure a number is: standard errors, bootstrap intervals, and paired tests between two arms.

Values are per-sample scores of any unit. Everything that is drawn comes from a seed, so the same
scores give the same figures. Samples may fall into strata (the tasks of a group); a stratum counts
as much as any other, whatever its number of samples: m = mean over strata of the stratum's mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memdlm.errors import UsageError

Floats = NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95

# Elements of the largest array of draws, which bounds the memory used (8 bytes each).
_DRAWS_AT_ONCE = 2_000_000
# Differences that cancel but for rounding are as large as the one that was found.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean: The mean.
        standard_error: Of the mean; None where there is one value only.
        num_samples: Samples behind it, over all seeds.
        over: What the standard error is taken over, `samples` or `seeds`.
        num_seeds: Seeds behind it.
    """

    mean: float
    standard_error: float | None
    num_samples: int
    over: str = "samples"
    num_seeds: int = 1


@dataclass(frozen=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Whether two arms differ on the same samples.

    Attributes:
        difference: Mean of first - second.
        interval: Bootstrap interval of the difference.
        p_value: Two-sided; not corrected for other comparisons.
        num_samples: Pairs.
        num_better: Pairs in which the first is better.
        num_worse: Pairs in which the second is better.
        method: `sign` (exact, 0/1 scores) or `sign flip` (permutation, graded scores).
    """

    difference: float
    interval: Interval
    p_value: float
    num_samples: int
    num_better: int
    num_worse: int
    method: str


def mean_and_standard_error(values: ArrayLike) -> Estimate:
    """Return the mean of samples and its standard error.

    m = sum(x_i) / n and se = sqrt(sum((x_i - m)^2) / (n - 1)) / sqrt(n), as lm-eval has it.

    Args:
        values: Scores [n], n >= 1.

    Raises:
        UsageError: There is no value, or one that is not finite.
    """
    x = _scores(values)
    error = float(x.std(ddof=1)) / sqrt(len(x)) if len(x) > 1 else None
    return Estimate(float(x.mean()), error, len(x))


def over_strata(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent means, each counting the same (the tasks of a group).

    m = sum(m_j) / J and se = sqrt(sum(se_j^2)) / J; no standard error where a stratum has none.

    Raises:
        UsageError: There is no estimate.
    """
    if not estimates:
        raise UsageError("there is nothing to average: give at least one estimate")
    errors = [estimate.standard_error for estimate in estimates]
    known = [error for error in errors if error is not None]
    whole = len(known) == len(errors)
    return Estimate(
        sum(estimate.mean for estimate in estimates) / len(estimates),
        sqrt(sum(error**2 for error in known)) / len(estimates) if whole else None,
        sum(estimate.num_samples for estimate in estimates),
    )


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of per-seed means with its standard error over seeds.

    m = sum(m_s) / S and se = sqrt(sum((m_s - m)^2) / (S - 1)) / sqrt(S). With one seed there is
    nothing to compare seeds by: the standard error stays the one over its samples. `over` of the
    result says which of both it is.

    Raises:
        UsageError: There is no estimate.
    """
    if not estimates:
        raise UsageError("there is nothing to average: give at least one seed")
    if len(estimates) == 1:
        return estimates[0]
    means = mean_and_standard_error([estimate.mean for estimate in estimates])
    count = sum(estimate.num_samples for estimate in estimates)
    return Estimate(means.mean, means.standard_error, count, "seeds", len(estimates))


def bootstrap_means(
    values: ArrayLike,
    *,
    strata: Sequence[Any] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Floats:
    """Return the means of samples drawn anew with replacement, within each stratum.

    A figure that is a function of means (a ratio of sums, say) is bootstrapped by applying it to
    every row and taking `percentile_interval` of the results.

    Args:
        values: One value per sample [n], or several [n, ...], which stay together.
        strata: Stratum of each sample [n]; None for one.
        num_resamples: Resamples R.
        seed: Decides the draws.

    Returns:
        Means over each resample [R] or [R, ...], float64.

    Raises:
        UsageError: There is no value, one is not finite, or `strata` has another length.
    """
    x = _finite(values)
    flat = x.reshape(len(x), -1)
    parts = _strata(strata, len(x))
    draws = np.random.default_rng([seed, 1])
    total = np.zeros((num_resamples, flat.shape[1]))
    for members in parts:
        part = flat[members]
        for rows in _chunks(num_resamples, len(part) * flat.shape[1]):
            picked = draws.integers(0, len(part), size=(rows.stop - rows.start, len(part)))
            total[rows] += part[picked].mean(axis=1) / len(parts)
    return total.reshape(num_resamples, *x.shape[1:])


def percentile_interval(draws: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Return the quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of draws [R].

    Raises:
        UsageError: There is no draw, or `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence: {confidence} is out of range; use one between 0 and 1")
    low, high = np.quantile(_scores(draws), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def bootstrap_interval(
    values: ArrayLike,
    *,
    strata: Sequence[Any] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of the mean of samples [n].

    Raises:
        UsageError: As `bootstrap_means` and `percentile_interval`.
    """
    means = bootstrap_means(_scores(values), strata=strata, num_resamples=num_resamples, seed=seed)
    return percentile_interval(means, confidence)


def exact_sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p value of the exact sign test, McNemar's exact test for 0/1 scores.

    Pairs that agree say nothing. Of the n = b + w others, b is Binomial(n, 1/2) if the arms are
    equal, so p = min(1, 2 * sum_{i <= min(b, w)} C(n, i) / 2^n).
    """
    count = num_better + num_worse
    tail = sum(comb(count, i) for i in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def sign_flip_test(
    differences: ArrayLike,
    *,
    strata: Sequence[Any] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> float:
    """Return the two-sided p value of the paired permutation test.

    If the arms are equal, the sign of each difference d_i is as likely as the other. p is the share
    of sign patterns s with |m(s d)| >= |m(d)|: over all patterns where there are no more than
    `num_resamples`, else over as many random ones, p = (1 + hits) / (1 + num_resamples).

    Raises:
        UsageError: As `bootstrap_means`.
    """
    d = _scores(differences)
    parts = _strata(strata, len(d))
    weighted = np.empty_like(d)
    for members in parts:
        weighted[members] = d[members] / (len(members) * len(parts))
    least = abs(weighted.sum()) * (1 - _ROUNDING) - _ROUNDING * np.abs(weighted).max()
    weighted = weighted[weighted != 0]
    if not len(weighted):
        return 1.0
    if 2 ** min(len(weighted), 64) <= num_resamples:
        patterns = np.arange(2 ** len(weighted))[:, None] >> np.arange(len(weighted)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ weighted) >= least))
    draws = np.random.default_rng([seed, 2])
    hits = 0
    for rows in _chunks(num_resamples, len(weighted)):
        flips = draws.integers(0, 2, size=(rows.stop - rows.start, len(weighted)), dtype=np.int8)
        # The signed sum is the sum less twice what is flipped.
        hits += int(np.sum(np.abs(weighted.sum() - 2 * (flips @ weighted)) >= least))
    return (1 + hits) / (1 + num_resamples)


def paired_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    strata: Sequence[Any] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Compare two arms on the same samples.

    Scores that are all 0 or 1 get the exact sign test (McNemar), any other the sign-flip test. The
    interval is the percentile bootstrap of the mean difference, resampling pairs.

    Args:
        first: Scores of one arm [n].
        second: Scores of the other on the same samples, in the same order [n].
        strata: Stratum of each sample [n]; None for one.
        confidence: Of the interval.
        num_resamples: Resamples and, in the sign-flip test, sign patterns.
        seed: Decides the draws.

    Raises:
        UsageError: The arms have different numbers of scores, or as `bootstrap_means`.
    """
    a, b = _scores(first), _scores(second)
    if len(a) != len(b):
        raise UsageError(
            f"paired scores: {len(a)} and {len(b)} are not the same samples; give one score of "
            "each arm per sample"
        )
    d = a - b
    means = bootstrap_means(d, strata=strata, num_resamples=num_resamples, seed=seed)
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    if all(np.isin(x, (0, 1)).all() for x in (a, b)):
        method, p_value = "sign", exact_sign_test(better, worse)
    else:
        method = "sign flip"
        p_value = sign_flip_test(d, strata=strata, num_resamples=num_resamples, seed=seed)
    difference = float(np.mean([d[members].mean() for members in _strata(strata, len(d))]))
    interval = percentile_interval(means, confidence)
    return PairedTest(difference, interval, p_value, len(d), better, worse, method)


def _finite(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if not x.ndim or not len(x):
        raise UsageError("there is no score: give at least one sample")
    if not np.isfinite(x).all():
        raise UsageError("a score is inf or nan: leave that sample out, or mend its metric")
    return x


def _scores(values: ArrayLike) -> Floats:
    x = _finite(values)
    if x.ndim != 1:
        raise UsageError(f"scores have the shape {x.shape}: give one number per sample")
    return x


def _strata(strata: Sequence[Any] | None, count: int) -> list[NDArray[np.int64]]:
    """Return the indices of each stratum's samples."""
    if strata is None:
        return [np.arange(count)]
    if len(strata) != count:
        raise UsageError(f"strata: {len(strata)} for {count} samples; give one per sample")
    members: dict[Any, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    return [np.array(indices) for indices in members.values()]


def _chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Cut rows of `width` elements into parts that fit the bound on draws."""
    step = max(1, _DRAWS_AT_ONCE // max(1, width))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
