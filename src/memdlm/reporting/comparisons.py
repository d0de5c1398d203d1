"""Paired tests: whether two arms differ in a column, on the samples that both were asked.

Two answers belong together only if their prompts are the same, byte for byte. Over several seeds a
sample's difference is averaged first: the same document asked again is no new document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memdlm.reporting.paper import TRAIN_ONLY_SUFFIX, default_variant
from memdlm.reporting.results import ComparedArm, Evaluation
from memdlm.reporting.scores import Column
from memdlm.uncertainty import PairedTest, paired_test

# Up to so many arms each is compared with each; beyond it, with the one that they vary.
_FEW_ARMS = 4


@dataclass(frozen=True)
class Comparison:
    """Two arms in a column; `test` is of first - second.

    Attributes:
        column: The column's name.
        first: Label of the one arm.
        second: Label of the other.
        test: The test; None if they cannot be paired.
        reason: Why not; empty if they can.
    """

    column: str
    first: str
    second: str
    test: PairedTest | None
    reason: str = ""

    def cells(self) -> list[str]:
        """Return a row of the table of tests, in percentage points."""
        names = [self.column, self.first, self.second]
        if self.test is None:
            return [*names, self.reason, "", "", "", "", ""]
        test, interval = self.test, self.test.interval
        return [
            *names,
            f"{100 * test.difference:+.1f}",
            f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}",
            p_text(test.p_value),
            f"{test.num_samples:,}",
            f"{test.num_better:,} / {test.num_worse:,}",
            test.method,
        ]


HEADER = ["column", "arm", "against", "difference", "95 % interval", "p", "n", "better / worse"]
HEADER += ["test"]


def compared_pairs(evaluation: Evaluation) -> list[tuple[ComparedArm, ComparedArm]]:
    """Return the pairs of arms to test, the later one of an evaluation first.

    A few arms are all compared with each other. Of many (an ablation), each is compared with the
    default variant under the same conditions, or with the first arm where there is no default; and
    with the arm of the same training that has no memory.
    """
    arms = evaluation.arms
    if len(arms) <= _FEW_ARMS:
        return [(b, a) for index, b in enumerate(arms) for a in arms[:index]]
    by_name = {arm.name: arm for arm in arms}
    default = by_name.get(default_variant(evaluation.preset) or "", arms[0])
    without_memory = by_name.get(f"{default.name}{TRAIN_ONLY_SUFFIX}", default)
    pairs = []
    for arm in arms:
        is_train_only = arm.name.endswith(TRAIN_ONLY_SUFFIX)
        against = [without_memory if is_train_only else default]
        own = by_name.get(f"{arm.name}{TRAIN_ONLY_SUFFIX}")
        against += [] if own is None else [own]
        pairs += [(arm, other) for other in against if other is not arm]
    return pairs


def compare(
    evaluation: Evaluation, column: Column, first: ComparedArm, second: ComparedArm
) -> Comparison:
    """Test two arms in a column."""
    tasks, differences = [], []
    for task in column.tasks:
        pairs, reason = _pairs(evaluation, task, first.name, second.name)
        if reason:
            return Comparison(column.name, first.label, second.label, None, reason)
        tasks += [task] * len(pairs)
        differences += pairs
    test = paired_test([a for a, _ in differences], [b for _, b in differences], strata=tasks)
    return Comparison(column.name, first.label, second.label, test)


def compare_all(evaluation: Evaluation, shown: Sequence[Column]) -> list[Comparison]:
    """Test every pair of arms in every column."""
    pairs = compared_pairs(evaluation)
    return [compare(evaluation, column, *pair) for column in shown for pair in pairs]


def p_text(p_value: float) -> str:
    """Return a p value with as many digits as it has meaning."""
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.2g}"


def _pairs(
    evaluation: Evaluation, task: str, first: str, second: str
) -> tuple[list[tuple[float, float]], str]:
    """Return the scores of each document that both were asked, or why there are none."""
    asked: dict[tuple[int, str], list[tuple[float, float]]] = {}
    is_run = is_different = False
    for seed in evaluation.seeds:
        ours = evaluation.results.get((first, task, seed))
        theirs = evaluation.results.get((second, task, seed))
        if ours is None or theirs is None:
            continue
        is_run = True
        others = {sample.number: sample for sample in theirs.samples}
        for sample in ours.samples:
            other = others.get(sample.number)
            if other is None:
                continue
            if other.prompt != sample.prompt:
                is_different = True
                continue
            pair = sample.scores[ours.metric], other.scores[theirs.metric]
            asked.setdefault((sample.number, sample.prompt), []).append(pair)
    if is_different:
        return [], f"not paired: prompts of {task} differ"
    if not asked:
        return [], f"not paired: no sample of {task} in common" if is_run else "not run in both"
    means = [tuple(sum(side) / len(side) for side in zip(*p, strict=True)) for p in asked.values()]
    return [(a, b) for a, b in means], ""
