"""The probe's figures: means with intervals, what a memory changes, and what it takes back.

All intervals are bootstraps over samples, 95 %, paired where two things are compared. Samples of
several tasks count by task, each task the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdlm.uncertainty import Interval, bootstrap_means, paired_test, percentile_interval

METRICS = ("exact", "recall", "nll")
# Keys of a sample's answers: without a memory, and with one.
WITHOUT, WITH = "none", "prompt"

Floats = NDArray[np.float64]


def figures(
    records: Sequence[Mapping[str, Any]],
    conditions: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return an arm's figures as JSON holds them.

    Args:
        records: Per sample `source` and, per condition and memory (`none`, `prompt`), its metrics.
        conditions: What was asked; `recovered` needs `normal` among them.
        num_resamples: Resamples for intervals.
        seed: Decides them.

    Returns:
        `cells`: every metric by condition and memory. `memory_effects`: with - without the memory,
        by condition. `recovered`: of what a condition takes from the model without memory, the
        share that the memory gives back, (with - without) / (normal - without); null where the
        condition takes nothing that could be told from chance.
    """
    draws = {"num_resamples": num_resamples, "seed": seed}
    strata = [record["source"] for record in records]
    cells, effects, recovered = [], [], []
    for metric in METRICS:
        values = {
            (condition, memory): np.array(
                [record["answers"][condition][memory][metric] for record in records]
            )
            for condition in conditions
            for memory in (WITHOUT, WITH)
        }
        for (condition, memory), x in values.items():
            interval = percentile_interval(bootstrap_means(x, strata=strata, **draws))
            key = {"condition": condition, "memory": memory, "metric": metric}
            cells.append({**key, "value": _mean(x, strata), **_bounds(interval)})
        for condition in conditions:
            without, with_memory = values[condition, WITHOUT], values[condition, WITH]
            test = paired_test(with_memory, without, strata=strata, **draws)
            effects.append(
                {
                    "condition": condition,
                    "metric": metric,
                    "difference": test.difference,
                    **_bounds(test.interval),
                    "p_value": test.p_value,
                    "num_better": test.num_worse if metric == "nll" else test.num_better,
                    "num_worse": test.num_better if metric == "nll" else test.num_worse,
                }
            )
            if condition != "normal" and "normal" in conditions:
                columns = np.stack([values["normal", WITHOUT], without, with_memory], axis=1)
                key = {"condition": condition, "metric": metric}
                recovered.append({**key, **_recovered(columns, strata, draws)})
    return {"cells": cells, "memory_effects": effects, "recovered": recovered}


def _recovered(columns: Floats, strata: Sequence[str], draws: Mapping[str, int]) -> dict[str, Any]:
    """Return drop and recovered share of [N, 3]: normal, cut, cut with memory."""
    drawn = bootstrap_means(columns, strata=strata, **draws)  # [R, 3]
    drop = drawn[:, 0] - drawn[:, 1]
    interval = percentile_interval(drop)
    normal, cut, with_memory = (_mean(column, strata) for column in columns.T)
    found = {"drop": normal - cut, "drop_low": interval.low, "drop_high": interval.high}
    if interval.low <= 0 <= interval.high:
        return {**found, "share": None, "low": None, "high": None}
    # Where 0 lies far out, the share of a few resamples may still divide by nothing.
    kept = np.abs(drop) > 1e-12
    share = percentile_interval((drawn[kept, 2] - drawn[kept, 1]) / drop[kept])
    return {**found, "share": (with_memory - cut) / (normal - cut), **_bounds(share)}


def _mean(values: Floats, strata: Sequence[str]) -> float:
    """Return the mean over strata of each one's mean."""
    labels = np.array(strata)
    return float(np.mean([values[labels == name].mean() for name in dict.fromkeys(strata)]))


def _bounds(interval: Interval) -> dict[str, float]:
    return {"low": interval.low, "high": interval.high}
