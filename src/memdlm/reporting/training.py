"""Training runs side by side: what they ended with, in which settings they differ, their curves."""

from collections.abc import Sequence
from math import isfinite

from memdlm.reporting.blocks import Block, Grid, Heading, Paragraph, Part, Picture
from memdlm.reporting.figures import figure, look, plain, png
from memdlm.reporting.runs import Run
from memdlm.reporting.settings import NOTHING, differing

# Figure -> its panels: (logged name, label).
_FIGURES: dict[str, list[tuple[str, str]]] = {
    "training": [
        ("loss", "training loss\n(with the memory, where there is one)"),
        ("nll", "training NLL per masked token\n(with the memory, where there is one)"),
    ],
    "evaluation": [
        ("eval_loss", "evaluation loss, without memory"),
        ("eval_nll", "evaluation NLL per masked token,\nwithout memory"),
    ],
}
FIGURES = tuple(_FIGURES)

# More points than this are drawn faint, under their running mean.
_MANY_POINTS = 60


def training_part(runs: Sequence[Run], title: str = "") -> Part:
    """Return the part of a page that compares `runs`, below a title if it is not alone."""
    figures = {
        name: _draw(runs, panels)
        for name, panels in _FIGURES.items()
        if any(run.series(key)[0] for run in runs for key, _ in panels)
    }
    header, rows = result_rows(runs)
    note = (
        "Loss and NLL of training are those of the last log line and are conditioned on the memory "
        "where there is one; those of evaluation never are. Compare runs with and without memory "
        "by the latter. Seconds per step and tokens per second are medians over the log lines."
    )
    return Part(
        title,
        [
            Grid(header, rows),
            Paragraph(note, "note"),
            *(Picture(name, content, f"{name} curves") for name, content in figures.items()),
            Heading("Settings that differ", 3 if title else 2),
            _settings(runs),
        ],
    )


def result_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of results, cells as text."""
    header = ["run", "complete", "steps", "train loss", "train NLL", "eval loss", "eval NLL"]
    header += ["s/step", "tokens/s"]
    rows = []
    for run in runs:
        losses = (run.last(key) for key in ("loss", "nll", "eval_loss", "eval_nll"))
        rows.append(
            [
                run.name,
                "yes" if run.is_complete else "no",
                f"{run.num_steps:,}",
                *(_number(value, ".4f") for value in losses),
                _number(run.seconds_per_step(), ".3g"),
                _number(run.tokens_per_second(), ",.0f"),
            ]
        )
    return header, rows


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return dotted key -> value in each run, as text, for the settings that are not all equal."""
    return differing([run.settings for run in runs])


def _settings(runs: Sequence[Run]) -> Block:
    if len(runs) == 1:
        return Paragraph("There is one run only.")
    differences = differing_settings(runs)
    if not differences:
        return Paragraph("None: the runs were started with the same settings.")
    rows = [[key, *values] for key, values in differences.items()]
    return Grid(["setting", *(run.name for run in runs)], rows)


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _draw(runs: Sequence[Run], panels: Sequence[tuple[str, str]]) -> bytes:
    made, all_axes = figure(len(panels))
    lines = {}
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        for index, run in enumerate(runs):
            steps, values = run.series(key)
            if len(values) > _MANY_POINTS:
                axes.plot(steps, values, alpha=0.25, lw=0.8, **look(index))
                values = _running_mean(values)
            marker = "o" if len(values) <= _MANY_POINTS // 2 else ""
            (lines[run.name],) = axes.plot(steps, values, marker=marker, ms=3, **look(index))
        axes.set_xlabel("step")
        axes.set_ylabel(label, fontsize=9)
    made.legend(
        list(lines.values()),
        [plain(name) for name in lines],
        loc="outside lower center",
        ncols=min(4, len(runs)),
        frameon=False,
        fontsize=8,
    )
    return png(made)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, over about a twentieth of the curve."""
    width = max(2, len(values) // 20)
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if isfinite(value)]
        means.append(sum(window) / len(window) if window else float("nan"))
    return means
