"""What an exposure-bias measurement gives: sums per sample, and the curves and intervals from them.

A ratio is one of sums over samples, so its interval comes from drawing whole samples anew: tokens
of one answer stand or fall together. All arms are drawn with the same samples, which pairs them.
Shapes: N samples, S steps, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdlm.errors import UsageError
from memdlm.uncertainty import Interval, bootstrap_means, percentile_interval

Floats = NDArray[np.float64]

# A model that is sure of every clean token has a likelihood of nearly nothing to divide by.
_LEAST_NLL = 1e-12


@dataclass(frozen=True)
class ExposureBias:
    """Both likelihoods at every step, averaged over the masked tokens of all samples.

    Attributes:
        mask_ratio: Share of the slots still masked before the step [S]; falls from 1.
        static_nll: Mean negative log-likelihood in clean context [S], nats per token.
        sequential_nll: The same in the model's own context [S].
        num_tokens: Scored tokens [S].
    """

    mask_ratio: tuple[float, ...]
    static_nll: tuple[float, ...]
    sequential_nll: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Sequential over static likelihood at every step; 1 at the first by definition."""
        pairs = zip(self.sequential_nll, self.static_nll, strict=True)
        return tuple(sequential / max(static, _LEAST_NLL) for sequential, static in pairs)

    @property
    def overall_ratio(self) -> float:
        """The same over all tokens of all steps but the first, where both are equal."""
        weights = self.num_tokens[1:]
        sequential = sum(w * x for w, x in zip(weights, self.sequential_nll[1:], strict=True))
        static = sum(w * x for w, x in zip(weights, self.static_nll[1:], strict=True))
        return sequential / max(static, _LEAST_NLL)


@dataclass(frozen=True)
class BiasSums:
    """What was summed over the masked tokens of each sample.

    Attributes:
        mask_ratio: Share of the slots still masked before the step [S]; that of every sample.
        static_nll: Negative log-likelihoods in clean context [N, S], nats.
        sequential_nll: The same in the model's own context [N, S].
        num_tokens: Scored tokens [N, S].
        num_dropped: Samples whose memory met inf or nan and was left out.
    """

    mask_ratio: tuple[float, ...]
    static_nll: Floats
    sequential_nll: Floats
    num_tokens: NDArray[np.int64]
    num_dropped: int = 0

    def summary(self) -> ExposureBias:
        """Return the means over all samples."""
        tokens = self.num_tokens.sum(axis=0)
        count = np.maximum(tokens, 1)
        return ExposureBias(
            mask_ratio=self.mask_ratio,
            static_nll=tuple((self.static_nll.sum(axis=0) / count).tolist()),
            sequential_nll=tuple((self.sequential_nll.sum(axis=0) / count).tolist()),
            num_tokens=tuple(tokens.tolist()),
        )

    def pairs(self) -> Floats:
        """Return sequential and static sums by step, all steps but the first together last.

        Returns:
            [N, S + 1, 2] float64.
        """
        by_step = np.stack([self.sequential_nll, self.static_nll], axis=-1)
        return np.concatenate([by_step, by_step[:, 1:].sum(axis=1, keepdims=True)], axis=1)


def curve_record(sums: BiasSums, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Return an arm's figures as JSON holds them, with 95 % intervals.

    Args:
        sums: What was measured.
        num_resamples: Resamples R of the samples.
        seed: Decides them.

    Returns:
        Lists over the steps; a ratio is null where no token was scored. `samples` has the sums of
        each sample over all steps but the first, from which any pair of arms can be compared.
    """
    bias = sums.summary()
    ratios = _ratios(bootstrap_means(sums.pairs(), num_resamples=num_resamples, seed=seed))
    is_scored = [count > 0 for count in bias.num_tokens]
    bands = [
        _interval(ratios[:, step]) if scored else None for step, scored in enumerate(is_scored)
    ]
    pairs = zip(bias.ratios, is_scored, strict=True)
    overall = _interval(ratios[:, -1])
    return {
        "mask_ratio": list(bias.mask_ratio),
        "static_nll": list(bias.static_nll),
        "sequential_nll": list(bias.sequential_nll),
        "ratio": [ratio if scored else None for ratio, scored in pairs],
        "ratio_low": [None if band is None else band.low for band in bands],
        "ratio_high": [None if band is None else band.high for band in bands],
        "overall": {"value": bias.overall_ratio, "low": overall.low, "high": overall.high},
        "num_tokens": list(bias.num_tokens),
        "num_dropped_memories": sums.num_dropped,
        "samples": {
            "sequential_nll": sums.sequential_nll[:, 1:].sum(axis=1).tolist(),
            "static_nll": sums.static_nll[:, 1:].sum(axis=1).tolist(),
            "num_tokens": sums.num_tokens[:, 1:].sum(axis=1).tolist(),
        },
    }


def pair_records(
    names: Sequence[str], sums: Sequence[BiasSums], *, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return the difference of the overall ratios of every two arms, second - first, as JSON.

    The interval is the paired bootstrap: both arms are drawn with the same samples.

    Raises:
        UsageError: The arms were measured on different numbers of samples.
    """
    if len({len(one.num_tokens) for one in sums}) > 1:
        raise UsageError("the arms were measured on different samples: measure them together")
    overall = [one.pairs()[:, -1] for one in sums]
    # One call for all arms: every resample draws the same samples of each.
    means = bootstrap_means(np.stack(overall, axis=1), num_resamples=num_resamples, seed=seed)
    drawn = _ratios(means)  # [R, arms]
    values = [one.summary().overall_ratio for one in sums]
    records = []
    for second in range(len(names)):
        for first in range(second):
            interval = _interval(drawn[:, second] - drawn[:, first])
            records.append(
                {
                    "first": names[first],
                    "second": names[second],
                    "difference": values[second] - values[first],
                    "low": interval.low,
                    "high": interval.high,
                }
            )
    return records


def _ratios(sums: Floats) -> Floats:
    """Return sequential over static of [..., 2]."""
    ratios: Floats = sums[..., 0] / np.maximum(sums[..., 1], _LEAST_NLL)
    return ratios


def _interval(draws: Floats) -> Interval:
    return percentile_interval(draws)
