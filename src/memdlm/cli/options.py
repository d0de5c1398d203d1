"""Options that several commands share, so that they mean and read the same everywhere."""

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="Run folder, model or adapter folder, or hub name.")
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter to put on the model.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the weights: auto, float32, ...")]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="nf4|none",
        help="4-bit base weights. Default: as the run was trained; none without a run folder.",
    ),
]
Arms = Annotated[
    list[str],
    typer.Option(
        "--arm",
        metavar="NAME=MODEL[,ADAPTER]",
        help="What is compared: a run folder, model or hub name, by the name of its line in the "
        "results. Repeat it.",
    ),
]
Rows = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Rows as for training: .jsonl, .json, .parquet."),
]
GeneratedTasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="TASK@WORDS",
        help="In place of --data: generated tasks, e.g. generated_variable_tracking@96, or "
        "generated@96 for all of them. Repeat it.",
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-samples", "-n", help="Rows, or rows of each task. Default: all of a file; 100."
    ),
]
