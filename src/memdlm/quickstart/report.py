"""Draws the quickstart's results: a text table, plots, and one self-contained HTML page."""

import html
import json
from pathlib import Path
from typing import Any

from memdlm.quickstart.config import SETTINGS
from memdlm.reporting.figures import figure, png
from memdlm.reporting.page import Place, Section, image, table

_COLOURS = dict(zip(SETTINGS, ("#7a7a7a", "#3b7dd8", "#d8623b"), strict=True))

_GUESSING = "choosing among the values present"


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the main table, cells as text; the last row is guessing."""
    factors = [str(factor) for factor in results["config"]["length_factors"]]
    length = results["config"]["train_length"]
    header = ["setting", *(f"{int(factor) * length} words" for factor in factors), "exposure bias"]
    rows = []
    for setting, figures in results["settings"].items():
        cells = [f"{100 * figures['accuracy'][factor]['all']:.1f} %" for factor in factors]
        rows.append([setting, *cells, f"{figures['exposure_bias']['overall_ratio']:.3f}"])
    guesses = [f"{100 * results['guessing'][factor]['all']:.1f} %" for factor in factors]
    rows.append([_GUESSING, *guesses, ""])
    return header, rows


def write_report(results: dict[str, Any], output: Path) -> Path:
    """Write `accuracy.png`, `exposure_bias.png`, `training.png` and `report.html`; return it."""
    figures = {
        "accuracy": _plot_accuracy(results),
        "exposure_bias": _plot_exposure_bias(results),
        "training": _plot_training(results),
    }
    section = Section("", _body(results, figures), figures)
    return Place(output / "report.html").write("MemDLM quickstart", [section])


def _body(results: dict[str, Any], figures: dict[str, bytes]) -> str:
    config = results["config"]
    header, rows = table_rows(results)
    settings = json.dumps(
        {key: results[key] for key in ("config", "objective", "versions", "seconds")}, indent=1
    )
    parts = [
        f"<p>A tiny LLaDA ({results['num_parameters']:,} parameters) was fine-tuned for "
        f"{config['num_steps']} steps of {config['batch_size']} rows with Standard MDLM and with "
        "MemDLM, from the same weights, batches and masks. Exact answers on held-out tasks whose "
        "values never occur in training, at the training length and beyond; seed "
        f"{config['seed']}, {config['num_eval_examples']} rows per length.</p>",
        table(header, rows, muted=[_GUESSING]),
        '<p class="note">Exposure bias: negative log-likelihood of the answer in the model\'s own '
        "context over that in clean context, all denoising steps but the first; 1 is none. One "
        "seed of a tiny model says little: see docs/log.md for several.</p>",
        "<h2>Accuracy by length</h2>",
        image(figures["accuracy"], "accuracy by length"),
        "<h2>By task</h2>",
        _task_tables(results),
        "<h2>Exposure bias over the denoising steps</h2>",
        image(figures["exposure_bias"], "exposure bias by step"),
        "<h2>Training</h2>",
        image(figures["training"], "training curves"),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(settings)}</pre>",
    ]
    return "\n".join(parts)


def _task_tables(results: dict[str, Any]) -> str:
    """Return one table per length: settings down, tasks across."""
    tasks = results["config"]["tasks"]
    sources = {name: figures["accuracy"] for name, figures in results["settings"].items()}
    sources[_GUESSING] = results["guessing"]
    parts = []
    for factor in results["config"]["length_factors"]:
        header = [f"{factor * results['config']['train_length']} words"]
        header += [task.replace("_", " ") for task in tasks]
        rows = [
            [name, *(f"{100 * accuracy[str(factor)][task]:.1f} %" for task in tasks)]
            for name, accuracy in sources.items()
        ]
        parts.append(table(header, rows, muted=[_GUESSING]))
    return "\n".join(parts)


def _plot_accuracy(results: dict[str, Any]) -> bytes:
    made, (axes,) = figure()
    factors = [str(factor) for factor in results["config"]["length_factors"]]
    width = 0.26
    for offset, (setting, figures) in enumerate(results["settings"].items()):
        places = [place + (offset - 1) * width for place in range(len(factors))]
        heights = [100 * figures["accuracy"][factor]["all"] for factor in factors]
        bars = axes.bar(places, heights, width * 0.92, label=setting, color=_COLOURS[setting])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)  # as in the tables
    for place, factor in enumerate(factors):
        level = 100 * results["guessing"][factor]["all"]
        axes.hlines(level, place - 0.4, place + 0.4, colors="#222", linestyles=":", lw=1)
    length = results["config"]["train_length"]
    axes.set_xticks(range(len(factors)), [f"{int(factor) * length} words" for factor in factors])
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False, fontsize=8)
    return png(made)


def _plot_exposure_bias(results: dict[str, Any]) -> bytes:
    made, (axes,) = figure()
    for setting, figures in results["settings"].items():
        bias = figures["exposure_bias"]
        committed = [100 * (1 - ratio) for ratio in bias["mask_ratio"]]
        axes.plot(committed, bias["ratios"], marker="o", ms=3, label=setting, c=_COLOURS[setting])
    axes.axhline(1, color="#222", lw=0.8, ls=":")
    axes.set_xlabel("response committed, %")
    axes.set_yscale("log")
    axes.set_ylabel("sequential / static NLL")
    axes.legend(frameon=False, fontsize=8)
    return png(made)


def _plot_training(results: dict[str, Any]) -> bytes:
    made, (axes,) = figure()
    names = {"mdlm": ("Standard MDLM", SETTINGS[0]), "memdlm": ("MemDLM", SETTINGS[1])}
    for key, (label, setting) in names.items():
        curve = results["curves"][key]
        steps = [entry["step"] for entry in curve]
        axes.plot(steps, [entry["nll"] for entry in curve], label=label, c=_COLOURS[setting])
    axes.set_xlabel("step")
    axes.set_ylabel("training NLL per masked token\n(MemDLM: with its memory)", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return png(made)
