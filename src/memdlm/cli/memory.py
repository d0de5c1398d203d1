"""`memdlm memory`: write a memory that is kept, look into one, export it, delete it."""

from pathlib import Path
from typing import Annotated

import typer

from memdlm.cli import options

memory = typer.Typer(help="Write, show, export and delete memories that are kept.")

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a kept memory.")]


@memory.command("write")
def write(
    prompt: Annotated[
        str | None, typer.Argument(help="The text; standard input if neither this nor --file.")
    ] = None,
    model: options.Model = ...,  # type: ignore[assignment]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the memory; must not exist.")
    ] = ...,  # type: ignore[assignment]
    adapter: options.Adapter = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="A file with the text, of any length.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of memory or objective, e.g. memory.chunk_length=2048.",
        ),
    ] = None,
    chat_template: Annotated[
        str, typer.Option(help="auto, or never to write the raw text, as the paper evaluates.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the memory.")] = 0,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
) -> None:
    """Write a text into a memory and keep it in a folder."""
    from memdlm.cli.generate import read_prompts
    from memdlm.cli.libraries import prepare_libraries

    prompts = read_prompts(prompt, file)
    prepare_libraries()

    from memdlm.cli.generation_run import GenerationRequest
    from memdlm.cli.memory_run import write_memory

    request = GenerationRequest(
        prompts=prompts,
        model=model,
        adapter=adapter,
        memory="on",
        max_new_tokens=None,
        assignments=tuple(assignments or ()),
        chat_template=chat_template,
        seed=seed,
        batch_size=1,
        dtype=dtype,
        quantization=quantization,
    )
    print(write_memory(request, output))


@memory.command("show")
def show(
    folder: _Folder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, as one JSON object.")
    ] = False,
) -> None:
    """Tell where a memory comes from, its size, its norms and which experts were written.

    Needs no model.
    """
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.cli.memory_run import show_memory

    print(show_memory(folder, as_json))


@memory.command("export")
def export(
    folder: _Folder,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the adapter; must not exist.")
    ] = ...,  # type: ignore[assignment]
    layout: Annotated[
        str,
        typer.Option(
            help="peft: for PEFT on memdlm's models. published: one pair of factors per expert, "
            "for the official code and for 4-bit bases. load_model reads both."
        ),
    ] = "peft",
    row: Annotated[int, typer.Option(help="Which memory, where the folder holds several.")] = 0,
) -> None:
    """Write a memory as a LoRA adapter that PEFT loads, with the same logits. Needs no model."""
    import sys

    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.memory.artefact import Artefact
    from memdlm.memory.export import export_adapter

    artefact = Artefact.load(folder)
    export_adapter(artefact, output, row=row, layout=layout)
    if artefact.base.adapter is not None:
        print(
            "memdlm: this memory was written beside an outer adapter: load the exported one beside "
            "it, or on a model it was merged into",
            file=sys.stderr,
        )
    print(f"saved {output}")


@memory.command("delete")
def delete(folder: _Folder) -> None:
    """Remove a kept memory from the disk, whole or damaged."""
    from memdlm.memory.artefact import delete_memory

    delete_memory(folder)
    print(f"deleted {folder}")
