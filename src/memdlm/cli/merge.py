"""`memdlm merge`: add an adapter to its base model's weights, and write a plain model."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", help="Run folder, adapter folder, or hub name.")
    ] = ...,  # type: ignore[assignment]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the merged model; must not exist.")
    ] = ...,  # type: ignore[assignment]
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Base model: folder or hub name. Default: the one it names."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: auto (the base's), float32, ...")
    ] = "auto",
) -> None:
    """Merge an adapter into its base: a plain model in the official layout, and its tokenizer."""
    from memdlm.cli.quiet import silence_libraries

    silence_libraries()

    from memdlm.cli.merge_run import merge_adapter

    if not merge_adapter(adapter, model, output.expanduser(), dtype):
        typer.echo("no tokenizer lies beside the adapter or its base: none is written", err=True)
    print(f"saved {output}")
