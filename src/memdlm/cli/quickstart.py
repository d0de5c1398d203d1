"""`memdlm quickstart`: train both methods on a tiny network, compare them, draw the report."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for models, figures and report.")
    ] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of data, masks and fast weights.")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of the comparison, e.g. num_steps=100 or memory.rank=8.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in the output folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train Standard MDLM and MemDLM on generated tasks and compare them in three settings."""
    from memdlm.errors import UsageError

    output = output.expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        is_ours = (output / "results.json").is_file()
        if not is_ours:
            raise UsageError(f"{output} holds other files: choose another place with --output")
        if not overwrite:
            raise UsageError(
                f"{output} already holds results: replace them with --overwrite (with make: "
                "`make quickstart ARGS=--overwrite`), or choose another place with --output"
            )

    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from rich.console import Console

    from memdlm.cli.progress import TrainingProgress
    from memdlm.cli.run_folder import RunFolder
    from memdlm.cli.settings import apply_overrides, build
    from memdlm.quickstart.config import QuickstartConfig
    from memdlm.quickstart.report import table_rows, write_report
    from memdlm.quickstart.run import run_quickstart

    settings = apply_overrides({"seed": seed}, assignments or ())
    config = build(QuickstartConfig, settings, source="memdlm quickstart")
    console = Console(stderr=True)

    def announce(line: str) -> None:
        if not quiet:
            console.print(line, highlight=False, soft_wrap=True)

    progress = TrainingProgress(console, quiet)
    try:
        # Beside the place, and moved there when whole: a run that is stopped leaves nothing behind.
        with RunFolder(output).staged() as folder:
            results = run_quickstart(config, folder, announce, [progress])
            write_report(results, folder)
    finally:
        progress.stop()
    _show(*table_rows(results))
    print(f"{results['seconds']['total']:.0f} seconds; open {output / 'report.html'}")


def _show(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="exact answers on held-out tasks", title_justify="left")
    for index, cell in enumerate(header):
        table.add_column(cell, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if _is_terminal() else 110).print(table)


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
