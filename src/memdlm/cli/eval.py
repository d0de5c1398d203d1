"""`memdlm eval`: score models on benchmarks, with and without a memory of each prompt."""

from pathlib import Path
from typing import Annotated

import typer

from memdlm.cli import options


def eval(  # the command's name; Python's own is not used here
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK...]",
            help="Tasks and groups, e.g. ruler_vt@4k babilong@1k; see --list.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="A table or figure of the paper, e.g. paper/table1."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Run folder, model or adapter folder, or hub name; in a preset the MemDLM one.",
        ),
    ] = None,
    adapter: options.Adapter = None,
    standard: Annotated[
        str | None,
        typer.Option(
            "--standard",
            metavar="MODEL[,ADAPTER]",
            help="Preset: the model that was trained without memory, for its baseline.",
        ),
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME=MODEL[,ADAPTER]",
            help="Preset: the model of one variant, e.g. of an ablation. Repeat it.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="paper/figure3: file or hub name of rows to measure it on."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="on|off|both",
            help="Without a preset: write a memory from each prompt, or not, or compare the two. "
            "Default: off.",
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="Preset: its generated tasks, for the quickstart's models."),
    ] = False,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples", "-n", help="Documents per task. Default: as many as the paper scores."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of documents and memories, e.g. 0,1,2.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Requests answered together; changes no answer.")
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results; a killed run goes on there."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ARM", help="Evaluate this arm only. Repeat it."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, e.g. sources.babi=DIR, sampling.threshold=0.9, memory.rank=8.",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            "-p",
            min=1,
            help="Processes of this machine that share the requests: one per GPU, or per CPU core. "
            "Changes no answer.",
        ),
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="This process's share of the requests, e.g. 0/4, where several machines work on "
            "one folder; torchrun sets it by itself.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an evaluation that is in the folder.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, count the requests, answer none."),
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show tasks, groups and presets, and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Score a model on TASKs, or the arms of a preset.

    After a kill the same command goes on with what is missing.

    `memdlm report` draws the page.
    """
    from memdlm.cli.processes import is_one_of_several

    if processes > 1 and not is_one_of_several(processes):
        from memdlm.cli.evaluation_place import evaluation_folder
        from memdlm.cli.evaluation_processes import run_in_processes

        folder = evaluation_folder(output, preset, tasks or ())
        run_in_processes(processes, folder, overwrite and not dry_run)
        return
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.cli.evaluation_request import EvaluationRequest
    from memdlm.cli.evaluation_run import run_request, show_list_of_tasks

    if show_list:
        show_list_of_tasks()
        return
    run_request(
        EvaluationRequest(
            tasks=tuple(tasks or ()),
            preset=preset,
            model=model,
            adapter=adapter,
            standard=standard,
            data=data,
            arms=tuple(arms or ()),
            memory=memory,
            tiny=tiny,
            num_samples=num_samples,
            seeds=seeds,
            batch_size=batch_size,
            output=output,
            only=tuple(only or ()),
            assignments=tuple(assignments or ()),
            shard=shard,
            processes=processes,
            dtype=dtype,
            quantization=quantization,
            overwrite=overwrite,
            dry_run=dry_run,
            quiet=quiet,
        )
    )
