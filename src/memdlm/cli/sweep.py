"""`memdlm sweep`: train and evaluate every variant of a table, a figure or an ablation."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET]", help="E.g. ablations/scope, paper/table1, or all of ablations."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Recipe (YAML) that every variant changes in its own way."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="tiny",
            help="In place of a recipe: the quickstart's tiny network and generated tasks.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change the recipe, e.g. training.max_steps=100."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-set",
            metavar="KEY=VALUE",
            help="Change the evaluation, e.g. batch_size=16 or sources.babi=DIR.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Results. Default: runs/sweep/ and the preset."
        ),
    ] = None,
    trainings: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where trainings are kept, for sweeps to share. Default: trainings in --output.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at a time. Default: one, or one per GPU.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to give to the processes in turn, e.g. 0,1.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the evaluation, e.g. 0,1,2. Default: the preset's.")
    ] = None,
    training_seeds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Repeat every training with these seeds, and report what holds over them. "
            "Default: the recipe's.",
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "-n", help="Documents per task.")
    ] = None,
    limit_variants: Annotated[
        str | None, typer.Option(metavar="A,B", help="Do only these variants.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a process. Default: 1 for tiny, else an equal share."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and evaluated.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="With --dry-run: the time it takes on a GPU, e.g. h200."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show presets and variants.")] = False,
) -> None:
    """Train and evaluate every variant of PRESET; equal trainings are done once.

    Started again, it goes on where it was, whatever ended it. Several of it on one folder share the
    work. Exits with 1 if a variant failed, after all others are done.
    """
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.cli.sweep_view import show_presets

    if show_list:
        show_presets()
        return
    from memdlm.cli.sweep_request import SweepArguments, read_request
    from memdlm.errors import UsageError

    if gpu is not None and not dry_run:
        raise UsageError("--gpu goes with --dry-run; --gpus names the GPUs to run on")
    devices = tuple(part.strip() for part in gpus.split(",")) if gpus else ()
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: use 1 or more")
    request = read_request(
        SweepArguments(
            preset=preset,
            recipe=recipe,
            model=model,
            assignments=tuple(assignments or ()),
            settings=tuple(settings or ()),
            output=output,
            trainings=trainings,
            seeds=seeds,
            num_samples=num_samples,
            limit_variants=limit_variants,
            training_seeds=training_seeds,
        )
    )
    from memdlm.cli.sweep_plan import plan_sweep

    plan = plan_sweep(request)
    if dry_run:
        from memdlm.cli.sweep_view import show_plan

        show_plan(plan, gpu)
        return
    from memdlm.cli.invocation import command_line
    from memdlm.cli.sweep_run import SweepOptions, run_sweep

    run_sweep(
        plan,
        SweepOptions(
            jobs=jobs or max(1, len(devices)),
            gpus=devices,
            threads=1 if threads is None and request.is_tiny else threads,
            command=command_line(),
        ),
    )
    for evaluation in plan.evaluations:
        print(f"{evaluation.preset.name}: {evaluation.folder}")
    sys.stdout.flush()
