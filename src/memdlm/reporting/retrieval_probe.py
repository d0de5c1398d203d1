"""The retrieval probe as a page and a terminal show it."""

from collections.abc import Mapping
from typing import Any

from memdlm.reporting.figures import figure, plain, png
from memdlm.reporting.page import Section, image, table

FIGURES = ("recall",)

Rows = tuple[list[str], list[list[str]]]

_MEMORIES = {"none": "no memory", "prompt": "memory"}


def result_rows(result: Mapping[str, Any]) -> Rows:
    """Return header and rows: every arm's metrics by condition, without and with a memory."""
    header = ["", "", "recall", "with memory", "exact", "with memory", "NLL", "with memory"]
    rows = []
    for arm in result["arms"]:
        cells = {(c["condition"], c["memory"], c["metric"]): c["value"] for c in arm["cells"]}
        for condition in result["conditions"]:
            row = [arm["label"], _words(condition)]
            for metric in ("recall", "exact"):
                row += [f"{100 * cells[condition, memory, metric]:.1f} %" for memory in _MEMORIES]
            row += [f"{cells[condition, memory, 'nll']:.3f}" for memory in _MEMORIES]
            rows.append(row)
    return header, rows


def effect_rows(result: Mapping[str, Any]) -> Rows:
    """Return header and rows: what the memory changes, and what it takes back of the cut."""
    header = [
        "",
        "",
        "recall by memory",
        "95 %",
        "NLL by memory",
        "95 %",
        "recall regained",
        "95 %",
    ]
    rows = []
    for arm in result["arms"]:
        effects = {(e["condition"], e["metric"]): e for e in arm["memory_effects"]}
        shares = {(r["condition"], r["metric"]): r for r in arm["recovered"]}
        for condition in result["conditions"]:
            recall, nll = effects[condition, "recall"], effects[condition, "nll"]
            row = [arm["label"], _words(condition)]
            row += [f"{100 * recall['difference']:+.1f}", _interval(recall, 100, "+.1f")]
            row += [f"{nll['difference']:+.4f}", _interval(nll, 1, "+.4f")]
            share = shares.get((condition, "recall"))
            if share is None:
                row += ["", ""]
            elif share["share"] is None:
                row += ["nothing was lost", ""]
            else:
                row += [f"{100 * share['share']:.1f} %", _interval(share, 100, ".1f")]
            rows.append(row)
    return header, rows


def retrieval_probe_section(result: Mapping[str, Any]) -> Section:
    """Return the section of a `probe.json`."""
    figures = {"recall": _draw(result)}
    parts = [
        "<p>The same questions with the way to the needle cut, without a memory and with one that "
        "was written from the whole prompt: <em>answer blocked</em>, the answer's rows of the "
        "attention cannot look at the needle; <em>all blocked</em>, no row outside of it can, so "
        "that what is right then comes from the weights; <em>question only</em>, without the "
        "document. Recall: answers found in the response; NLL: bound for the right "
        f"answer, nats per token; {result['num_samples']} questions, seed {result['seed']}; "
        "intervals: bootstrap over questions, 95 %.</p>",
        table(*result_rows(result)),
        image(figures["recall"], "recall by condition"),
        table(*effect_rows(result)),
    ]
    return Section("In-weight retrieval", "\n".join(parts), figures)


def _draw(result: Mapping[str, Any]) -> bytes:
    made, (axes,) = figure()
    conditions = result["conditions"]
    bars = [(arm, memory) for arm in result["arms"] for memory in _MEMORIES]
    width = 0.8 / len(bars)
    for index, (arm, memory) in enumerate(bars):
        cells = {
            c["condition"]: c
            for c in arm["cells"]
            if c["memory"] == memory and c["metric"] == "recall"
        }
        places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(conditions))]
        heights = [100 * cells[condition]["value"] for condition in conditions]
        errors = [
            [100 * abs(cells[c]["value"] - cells[c][bound]) for c in conditions]
            for bound in ("low", "high")
        ]
        axes.bar(
            places,
            heights,
            width * 0.9,
            yerr=errors,
            color=f"C{index // 2}",
            alpha=0.5 if memory == "none" else 1.0,
            error_kw={"lw": 0.8},
            label=plain(f"{arm['label']}, {_MEMORIES[memory]}"),
        )
    axes.set_xticks(range(len(conditions)), [_words(name) for name in conditions])
    axes.set_ylabel("recall, %")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False, fontsize=8)
    return png(made)


def _interval(found: Mapping[str, Any], scale: float, form: str) -> str:
    return f"{scale * found['low']:{form}} to {scale * found['high']:{form}}"


def _words(condition: str) -> str:
    return condition.replace("_", " ")
