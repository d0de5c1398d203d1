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
