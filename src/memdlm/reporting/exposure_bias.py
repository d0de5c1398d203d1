"""Exposure bias as a page shows it: curves over the denoising steps like the paper's Figure 3."""

from collections.abc import Mapping
from typing import Any

from memdlm.reporting.figures import figure, plain, png
from memdlm.reporting.page import Section, image, table

FIGURES = ("ratio", "nll")


def result_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: every arm's overall ratio and that of its last step."""
    header = ["arm", "sequential / static NLL", "95 % interval", "last step", "95 % interval"]
    rows = []
    for arm in result["arms"]:
        overall = arm["overall"]
        cells = [_number(overall["value"]), _interval(overall["low"], overall["high"])]
        last = [arm[name][-1] for name in ("ratio", "ratio_low", "ratio_high")]
        rows.append([arm["label"], *cells, _number(last[0]), _interval(*last[1:])])
    return header, rows


def pair_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the differences between arms, in overall ratios."""
    labels = {arm["name"]: arm["label"] for arm in result["arms"]}
    rows = [
        [
            f"{labels[pair['second']]} - {labels[pair['first']]}",
            f"{pair['difference']:+.3f}",
            _interval(pair["low"], pair["high"]),
        ]
        for pair in result["pairs"]
    ]
    return ["difference", "", "95 % interval, paired"], rows


def exposure_bias_section(result: Mapping[str, Any]) -> Section:
    """Return the section of an `exposure_bias.json`."""
    figures = {"ratio": _draw_ratios(result), "nll": _draw_likelihoods(result)}
    num_steps = len(result["arms"][0]["mask_ratio"])
    parts = [
        "<p>Negative log-likelihood of the still masked tokens of the clean response, in the "
        "context that the model itself has decoded (sequential) and in the clean one (static), at "
        f"the same masks; {result['num_samples']} samples, {num_steps} denoising steps, "
        f"seed {result['seed']}. A ratio of 1 is no exposure bias. The overall ratio leaves the "
        "first step out, where nothing is decoded yet. Bands and intervals: bootstrap over "
        "samples, 95 %.</p>",
        table(*result_rows(result)),
        image(figures["ratio"], "sequential over static likelihood by step"),
        image(figures["nll"], "both likelihoods by step"),
    ]
    if result["pairs"]:
        parts.append(table(*pair_rows(result)))
    return Section("Exposure bias over the denoising steps", "\n".join(parts), figures)


def _draw_ratios(result: Mapping[str, Any]) -> bytes:
    made, (axes,) = figure()
    for index, arm in enumerate(result["arms"]):
        steps, ratio, low, high = _scored(arm)
        axes.plot(steps, ratio, marker="o", ms=3, label=plain(arm["label"]), color=f"C{index}")
        axes.fill_between(steps, low, high, color=f"C{index}", alpha=0.15, lw=0)
    axes.axhline(1, color="#222", lw=0.8, ls=":")
    axes.set_xlabel("denoising step")
    axes.set_yscale("log")
    axes.set_ylabel("sequential / static NLL")
    axes.legend(frameon=False, fontsize=8)
    return png(made)


def _draw_likelihoods(result: Mapping[str, Any]) -> bytes:
    made, (axes,) = figure()
    for index, arm in enumerate(result["arms"]):
        steps = range(1, len(arm["static_nll"]) + 1)
        axes.plot(steps, arm["sequential_nll"], label=plain(arm["label"]), color=f"C{index}")
        axes.plot(steps, arm["static_nll"], color=f"C{index}", ls="--")
    axes.set_xlabel("denoising step")
    axes.set_ylabel("NLL per token, nats\n(dashed: static)", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return png(made)


def _scored(arm: Mapping[str, Any]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the steps in which a token was scored, and the ratio with its band there."""
    steps = [step for step, ratio in enumerate(arm["ratio"]) if ratio is not None]
    columns = [[arm[name][step] for step in steps] for name in ("ratio", "ratio_low", "ratio_high")]
    return [step + 1 for step in steps], columns[0], columns[1], columns[2]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
