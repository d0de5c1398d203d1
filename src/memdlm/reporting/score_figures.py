"""Figures of scores: over lengths, as bars, over the mask ratio of the prompt's memory.

The paper's figures are dashed lines or diamonds; bars and whiskers are one standard error.
"""

from collections.abc import Sequence
from typing import Any

from memdlm.reporting.figures import figure, look, plain, png
from memdlm.reporting.paper import TRAIN_ONLY_SUFFIX
from memdlm.reporting.results import ComparedArm, Evaluation
from memdlm.reporting.scores import Column, Score, score

# Figure -> what it shows, for those who cannot see it.
LENGTHS, BARS, RATIOS = "scores_by_length", "scores", "scores_by_anchor_ratio"
ALTERNATIVES = {
    LENGTHS: "scores over the length, a line per arm",
    BARS: "scores of every arm as bars",
    RATIOS: "scores over the mask ratio of the prompt's memory",
}

_MANY_COLUMNS = 14
# Percent that bars can show at least, where all scores are 0.
_LEAST_RANGE = 1.0
_RATIO_SETTING = "prompt_mask_ratio"


def score_figures(evaluation: Evaluation, shown: Sequence[Column]) -> dict[str, bytes]:
    """Return figure -> PNG for those that these columns have something for."""
    ratios = anchor_ratios(evaluation)
    families = _families(shown)
    found: dict[str, bytes] = {}
    if not evaluation.results:
        return found
    if len(set(ratios.values())) > 1:
        found[RATIOS] = _over_ratios(evaluation, shown, ratios)
    if families:
        found[LENGTHS] = _over_lengths(evaluation, families)
    if not found and len(evaluation.arms) > 4:
        found[BARS] = _ablation_bars(evaluation, shown)
    elif not found and len(shown) <= _MANY_COLUMNS:
        found[BARS] = _grouped_bars(evaluation, shown)
    return found


def anchor_ratios(evaluation: Evaluation) -> dict[str, float]:
    """Return arm -> the mask ratio its memories are written at, for arms that have a memory."""
    found = {}
    for arm in evaluation.arms:
        memory = arm.settings.get("memory")
        ratio = memory.get(_RATIO_SETTING) if isinstance(memory, dict) else None
        if arm.has_memory and isinstance(ratio, int | float):
            found[arm.name] = float(ratio)
    return found


def _families(shown: Sequence[Column]) -> dict[str, list[Column]]:
    """Return task -> its columns by growing length, for tasks that come in several lengths."""
    found: dict[str, list[Column]] = {}
    for column in shown:
        if column.length:
            found.setdefault(column.base, []).append(column)
    return {
        base: sorted(columns, key=lambda column: _length(column.length))
        for base, columns in found.items()
        if len(columns) > 1
    }


def _length(text: str) -> int:
    number = int(text.removesuffix("k"))
    return number * 1024 if text.endswith("k") else number


def _over_lengths(evaluation: Evaluation, families: dict[str, list[Column]]) -> bytes:
    made, panels = figure(len(families))
    has_paper = False
    for axes, (base, columns) in zip(panels, families.items(), strict=True):
        for index, arm in enumerate(evaluation.arms):
            scores = [score(evaluation, arm, column) for column in columns]
            _line(axes, range(len(columns)), scores, arm.label, index)
            has_paper |= any(_has_point(each) for each in scores)
        axes.set_title(plain(base), fontsize=10)
        axes.set_xticks(range(len(columns)), [column.length for column in columns])
        axes.set_xlabel("length")
    panels[0].set_ylabel("score, %")
    _legend(made, panels, has_paper, "dashed")
    return png(made)


def _line(
    axes: Any, places: Sequence[int], scores: Sequence[Score], label: str, index: int
) -> None:
    """Draw an arm's scores with whiskers, and the paper's under them, dashed."""
    look_of_it = look(index)
    run = [(x, s) for x, s in zip(places, scores, strict=True) if s.percent is not None]
    axes.errorbar(
        [x for x, _ in run],
        [s.percent for _, s in run],
        yerr=[s.error_percent or 0 for _, s in run],
        marker="o",
        ms=4,
        capsize=2.5,
        label=plain(label),
        **look_of_it,
    )
    theirs = [(x, s.paper.low) for x, s in zip(places, scores, strict=True)
              if s.paper is not None and _has_point(s)]  # fmt: skip
    axes.plot(*zip(*theirs, strict=True) if theirs else ([], []), ls="--", lw=1, marker="D", ms=3.5,
              mfc="none", alpha=0.7, color=look_of_it["color"])  # fmt: skip


def _has_point(each: Score) -> bool:
    """Tell whether the paper has a figure for this one, and not a range."""
    return each.paper is not None and each.paper.low == each.paper.high


def _ablation_bars(evaluation: Evaluation, shown: Sequence[Column]) -> bytes:
    """Draw a bar for each arm, one under the other; an arm without memory is lighter."""
    arms = evaluation.arms
    made, panels = figure(min(len(shown), 3), height=1.1 + 0.3 * len(arms))
    for axes, column in zip(panels, shown, strict=False):
        for place, arm in enumerate(arms):
            each = score(evaluation, arm, column)
            _bar(axes, place, each, _ablation_colour(arm))
        axes.set_yticks(range(len(arms)), [plain(arm.label) for arm in arms], fontsize=8)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_title(plain(column.name), fontsize=10)
        axes.set_xlabel("score, % (diamond: the paper)" if _has_paper(evaluation, column)
                        else "score, %")  # fmt: skip
        axes.set_xlim(0, max(_LEAST_RANGE, axes.get_xlim()[1]))
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[1:]:
        axes.set_yticklabels([])
    return png(made)


def _bar(axes: Any, place: int, each: Score, colour: str) -> None:
    if each.percent is not None:
        axes.barh(place, each.percent, 0.7, color=colour, xerr=each.error_percent or 0,
                  error_kw={"lw": 1, "capsize": 2})  # fmt: skip
    else:
        axes.text(0.5, place, "not run", va="center", fontsize=8, color="#777", style="italic")
    if each.paper is not None:
        axes.plot([each.paper.low, each.paper.high], [place, place], marker="D", ms=5, color="#111",
                  mfc="white", zorder=5)  # fmt: skip


def _ablation_colour(arm: ComparedArm) -> str:
    if arm.name.endswith(TRAIN_ONLY_SUFFIX):
        return "#f0b89e"
    return "#d8623b" if arm.has_memory else "#9a9a9a"


def _has_paper(evaluation: Evaluation, column: Column) -> bool:
    return any(score(evaluation, arm, column).paper is not None for arm in evaluation.arms)


def _grouped_bars(evaluation: Evaluation, shown: Sequence[Column]) -> bytes:
    """Draw the arms beside each other in every column."""
    made, (axes,) = figure()
    made.set_size_inches(max(7.5, min(11.0, 1.2 * len(shown))), 3.8)
    width = 0.8 / len(evaluation.arms)
    has_paper = False
    for index, arm in enumerate(evaluation.arms):
        places = [x + (index - (len(evaluation.arms) - 1) / 2) * width for x in range(len(shown))]
        scores = [score(evaluation, arm, column) for column in shown]
        axes.bar(
            places,
            [each.percent or 0 for each in scores],
            width * 0.92,
            yerr=[each.error_percent or 0 for each in scores],
            error_kw={"lw": 1, "capsize": 2},
            color=look(index)["color"],
            label=plain(arm.label),
        )
        for place, each in zip(places, scores, strict=True):
            if each.paper is not None:
                has_paper = True
                axes.plot(place, each.paper.low, marker="D", ms=4, color="#111", mfc="white")
    names = [plain(column.name.removeprefix("longbench_")) for column in shown]
    is_many = len(shown) > 6
    axes.set_xticks(range(len(shown)), names, fontsize=8, rotation=30 if is_many else 0,
                    ha="right" if is_many else "center")  # fmt: skip
    axes.set_ylabel("score, %")
    axes.set_ylim(0, max(_LEAST_RANGE, axes.get_ylim()[1]))
    _legend(made, [axes], has_paper, "diamonds")
    return png(made)


def _over_ratios(
    evaluation: Evaluation, shown: Sequence[Column], ratios: dict[str, float]
) -> bytes:
    """Draw a line for each length over the ratios; dotted, the same model without a memory."""
    made, (axes,) = figure()
    arms = sorted((arm for arm in evaluation.arms if arm.name in ratios),
                  key=lambda arm: ratios[arm.name])  # fmt: skip
    for index, column in enumerate(shown):
        scores = [score(evaluation, arm, column) for arm in arms]
        run = [(ratios[a.name], s) for a, s in zip(arms, scores, strict=True) if s.estimate]
        axes.errorbar(
            [ratio for ratio, _ in run],
            [each.percent for _, each in run],
            yerr=[each.error_percent or 0 for _, each in run],
            marker="o",
            ms=4,
            capsize=2.5,
            label=plain(column.name),
            **look(index),
        )
        paper = next((each.paper for each in scores if each.paper is not None), None)
        if paper is not None:
            axes.axhspan(paper.low, paper.high, alpha=0.15, color=look(index)["color"], lw=0,
                         label=f"the paper, {plain(column.name)}")  # fmt: skip
    axes.set_xticks(sorted(set(ratios.values())))
    axes.set_xlabel("mask ratio of the prompt while its memory is written")
    axes.set_ylabel("score, %")
    made.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png(made)


def _legend(made: Any, panels: Sequence[Any], has_paper: bool, mark: str) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=8,
        title=f"{mark}: the paper" if has_paper else None,
        title_fontsize=8,
    )
