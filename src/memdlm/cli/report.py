"""`memdlm report`: training runs side by side, as one page and its figures."""

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memdlm.cli.run_folder import RunFolder
    from memdlm.reporting.runs import Run


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders written by `memdlm train`.")
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
    """Compare RUNs: loss curves, final losses, speed, and the settings in which they differ.

    Reads what the runs have logged, of finished and of unfinished ones, and needs no model.
    """
    from memdlm.reporting.page import Place
    from memdlm.reporting.training import FIGURES, result_rows, training_section

    place = Place.of(output.expanduser())
    place.check_free(FIGURES, overwrite)
    found = _read(runs)
    # Building its font cache, or a sign that its font lacks, is nothing to read about.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # One section for each kind of result that a run folder holds; so far there is one kind.
    page = place.write(_title(found), [training_section(found)])
    _show(*result_rows(found))
    print(f"open {page}")


def _read(paths: list[Path]) -> "list[Run]":
    """Return the runs in these folders, named by what tells the folders apart.

    Raises:
        UsageError: A folder is given twice, or holds no run.
        CheckpointError: What a run has recorded cannot be read.
    """
    from memdlm.cli.run_folder import METRICS, RunFolder
    from memdlm.errors import UsageError
    from memdlm.reporting.runs import Run, read_metrics

    places = [path.expanduser().resolve() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UsageError(f"{paths[index]} is given twice: name every run once")
        if not RunFolder(place).is_run:
            raise UsageError(
                f"{paths[index]} is not a run folder, for it has no recipe.yaml: name folders that "
                "`memdlm train` has written"
            )
    found = []
    for path, place, name in zip(paths, places, _names(places), strict=True):
        folder = RunFolder(place)
        records = read_metrics(path.expanduser() / METRICS, _remark)
        found.append(Run(name, _settings(folder), records, folder.result() is not None))
    return found


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


def _title(runs: "list[Run]") -> str:
    return f"Training: {runs[0].name}" if len(runs) == 1 else f"Training: {len(runs)} runs"


def _remark(line: str) -> None:
    print(f"memdlm: {line}", file=sys.stderr)


def _show(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, cell in enumerate(header):
        table.add_column(cell, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 130, markup=False).print(table)
