"""`memdlm report`: training runs and evaluations, side by side with the paper, as one page."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memdlm.cli.run_folder import RunFolder
    from memdlm.reporting.blocks import Part
    from memdlm.reporting.evaluation_folder import EvaluationResults
    from memdlm.reporting.page import Cell, Place
    from memdlm.reporting.runs import Run
    from memdlm.reporting.trainings import RepeatedTrainings


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folders written by `memdlm train`, `eval`, `sweep`, `exposure-bias` or `probe`.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR|FILE.html",
            help="Folder of the page (report.html) and its figures, or the page itself.",
        ),
    ] = Path("runs/report"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a page that is there.")
    ] = False,
) -> None:
    """Compare training runs (curves, losses, settings) and show evaluations beside the paper.

    Reads what commands have left, finished or not, and needs no model. Of evaluations it writes
    the same tables as a Markdown page as well: report.md.
    """
    from memdlm.reporting.page import Place
    from memdlm.reporting.training import FIGURES

    place = Place.of(output.expanduser())
    place.check_free([], overwrite)
    runs, evaluations = _read(folders)
    place.check_free(FIGURES if runs else [], overwrite, with_markdown=bool(evaluations))
    # Building its font cache, or a sign that its font lacks, is nothing to read about.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    page = _write(place, runs, evaluations, overwrite)
    _print(runs, evaluations)
    print(f"open {page}")


def _write(
    place: "Place", runs: "list[Run]", evaluations: "list[EvaluationResults]", overwrite: bool
) -> Path:
    """Draw and write the page, and beside it the Markdown page where there is an evaluation."""
    from memdlm.reporting.blocks import markdown_page
    from memdlm.reporting.training import training_part

    parts: list[Part] = [group.part() for group in _repeated(evaluations)]
    parts += [found.part() for found in evaluations]
    if runs:
        parts.append(training_part(runs, "Training" if evaluations else ""))
    sections = [part.section() for part in parts]
    names = [name for section in sections for name in section.figures]
    title = _title(runs, evaluations)
    if not evaluations:
        return place.write(title, sections)
    place.check_free(names, overwrite, with_markdown=True)
    files = {name: place.figure(name).name for name in names}
    return place.write(title, sections, markdown_page(title, parts, files))


def _print(runs: "list[Run]", evaluations: "list[EvaluationResults]") -> None:
    from memdlm.reporting.training import result_rows

    for found in evaluations:
        print_results(found)
    for group in _repeated(evaluations):
        print(group.title)
        _show(*group.table())
    if runs:
        _show(*result_rows(runs))


def _repeated(evaluations: "list[EvaluationResults]") -> "list[RepeatedTrainings]":
    from memdlm.reporting.trainings import repeated_trainings

    return repeated_trainings([found.evaluation for found in evaluations if found.evaluation])


def print_results(found: "EvaluationResults") -> None:
    """Print the main tables of a folder of results."""
    for title, header, rows in found.main_tables():
        print(title)
        _show(header, rows)


def _read(paths: list[Path]) -> "tuple[list[Run], list[EvaluationResults]]":
    """Return the runs and the evaluations in folders, named by what tells the folders apart.

    Raises:
        UsageError: A folder is given twice, or holds neither.
        CheckpointError: What was recorded cannot be read.
    """
    from memdlm.cli.run_folder import METRICS, RunFolder
    from memdlm.errors import UsageError
    from memdlm.reporting.evaluation_folder import holds_results, read_results
    from memdlm.reporting.runs import Run, read_metrics

    places = [path.expanduser().resolve() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UsageError(f"{paths[index]} is given twice: name every folder once")
        if not RunFolder(place).is_run and not holds_results(place):
            raise UsageError(
                f"{paths[index]} is not a run folder, for it has no recipe.yaml, nor one of "
                "results, for it has no evaluation.json, exposure_bias.json or probe.json: name "
                "folders that `memdlm train` or `memdlm eval` has written"
            )
    runs, evaluations = [], []
    for path, place, name in zip(paths, places, _names(places), strict=True):
        folder = RunFolder(place)
        if folder.is_run:
            records = read_metrics(path.expanduser() / METRICS, _remark)
            runs.append(Run(name, _settings(folder), records, folder.result() is not None))
        if holds_results(place):
            evaluations.append(read_results(path.expanduser(), name, _remark))
    return runs, evaluations


def _settings(folder: "RunFolder") -> dict[str, Any]:
    """Return what decides a run's figures: its recipe but for its place, its data, its versions."""
    recipe = folder.recorded_recipe()
    recipe.pop("output_dir", None)
    return {**recipe, "hash": folder.recorded_data(), "version": folder.recorded_versions()}


def _names(places: list[Path]) -> list[str]:
    """Return the last parts of each path, as few as tell all of them apart."""
    longest = max(len(place.parts) for place in places)
    for count in range(1, longest + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _title(runs: "list[Run]", evaluations: "list[EvaluationResults]") -> str:
    if not evaluations:
        return f"Training: {runs[0].name}" if len(runs) == 1 else f"Training: {len(runs)} runs"
    if not runs and len(evaluations) == 1:
        return f"Evaluation: {evaluations[0].title}"
    counts = [f"{len(evaluations)} evaluation" + "s" * (len(evaluations) > 1)]
    if runs:
        counts.append(f"{len(runs)} training run" + "s" * (len(runs) > 1))
    return f"Report: {', '.join(counts)}"


def _remark(line: str) -> None:
    print(f"memdlm: {line}", file=sys.stderr)


def _show(header: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=any(not isinstance(cell, str) for row in rows for cell in row))
    for index, cell in enumerate(header):
        table.add_column(cell, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else "\n".join(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 130, markup=False).print(table)
