"""`memdlm train`: run a recipe."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML); see `memdlm recipe`.")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key, e.g. memory.enabled=false."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Resume although recipe or data differ from the run's."),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Refuse to resume with another number of processes."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a model with or without parametric memory, as RECIPE says."""
    from memdlm.errors import StoppedError, UsageError

    if resume and overwrite:
        raise UsageError(
            "--resume and --overwrite exclude each other: continue a run or replace it"
        )
    if force and not resume:
        raise UsageError("--force goes with --resume: it continues a run with other settings")

    if exact and not resume:
        raise UsageError("--exact goes with --resume: it holds a run to its number of processes")

    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from rich.console import Console

    from memdlm.cli.recipe import load_recipe
    from memdlm.cli.run_folder import RunFolder
    from memdlm.cli.training_run import run_recipe
    from memdlm.training.processes import is_first

    loaded = load_recipe(recipe, assignments or ())
    folder = RunFolder(
        Path(loaded.output_dir or Path("runs") / recipe.stem).expanduser(), is_first()
    )
    console = Console(stderr=True)
    try:
        outcome = run_recipe(
            loaded,
            folder,
            console,
            resume=resume,
            force=force,
            exact=exact,
            overwrite=overwrite,
            quiet=quiet,
        )
    except StoppedError as stopped:
        if folder.is_run:
            stopped.args = (f"{stopped}: continue with {_command(recipe, assignments or ())}",)
        raise
    if not folder.writes:
        return
    if outcome.num_steps == 0:
        print(f"{folder.path} is already finished: {outcome.result}")
        return
    if outcome.eval_loss is not None:
        print(f"eval loss (no memory): {outcome.eval_loss:.4f}")
    print(f"{outcome.num_steps} steps; saved {outcome.result}")


def _command(recipe: Path, assignments: Sequence[str]) -> str:
    """Return the command that continues a run."""
    options = [word for assignment in assignments for word in ("--set", assignment)]
    return shlex.join(["memdlm", "train", str(recipe), *options, "--resume"])
