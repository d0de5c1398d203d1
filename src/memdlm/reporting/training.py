"""Training runs side by side: what they ended with, in which settings they differ, their curves."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from memdlm.reporting.figures import figure, png
from memdlm.reporting.page import Section, image, table
from memdlm.reporting.runs import Run

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
_NOTHING = "–"  # noqa: RUF001  (a dash in a cell without a number)


def training_section(runs: Sequence[Run]) -> Section:
    """Return the part of a page that compares `runs`."""
    figures = {
        name: _draw(runs, panels)
        for name, panels in _FIGURES.items()
        if any(run.series(key)[0] for run in runs for key, _ in panels)
    }
    parts = [
        table(*result_rows(runs)),
        '<p class="note">Loss and NLL of training are those of the last log line and are '
        "conditioned on the memory where there is one; those of evaluation never are. Compare runs "
        "with and without memory by the latter. Seconds per step and tokens per second are medians "
        "over the log lines.</p>",
        *(image(content, f"{name} curves") for name, content in figures.items()),
        "<h2>Settings that differ</h2>",
        _settings(runs),
    ]
    return Section("", "\n".join(parts), figures)


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
    flat = [_flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    missing = object()
    return {
        key: [_text(settings[key]) if key in settings else _NOTHING for settings in flat]
        for key in keys
        if any(settings.get(key, missing) != flat[0].get(key, missing) for settings in flat)
    }


def _settings(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return "<p>There is one run only.</p>"
    differences = differing_settings(runs)
    if not differences:
        return "<p>None: the runs were started with the same settings.</p>"
    rows = [[key, *values] for key, values in differences.items()]
    return table(["setting", *(run.name for run in runs)], rows)


def _flatten(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        full = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, full)
        else:
            flat[full] = value
    return flat


def _text(value: Any) -> str:
    """Return a value as a recipe would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _draw(runs: Sequence[Run], panels: Sequence[tuple[str, str]]) -> bytes:
    made, all_axes = figure(len(panels))
    lines = {}
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        for index, run in enumerate(runs):
            steps, values = run.series(key)
            # Ten colours, then the same ones dashed, and so on.
            look: dict[str, Any] = {
                "color": f"C{index % 10}",
                "ls": ("-", "--", ":", "-.")[index // 10 % 4],
            }
            if len(values) > _MANY_POINTS:
                axes.plot(steps, values, alpha=0.25, lw=0.8, **look)
                values = _running_mean(values)
            marker = "o" if len(values) <= _MANY_POINTS // 2 else ""
            (lines[run.name],) = axes.plot(steps, values, marker=marker, ms=3, **look)
        axes.set_xlabel("step")
        axes.set_ylabel(label, fontsize=9)
    made.legend(
        list(lines.values()),
        # A dollar sign would begin a formula.
        [name.replace("$", r"\$") for name in lines],
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
