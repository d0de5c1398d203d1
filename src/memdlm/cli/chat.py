"""`memdlm chat`: talk with a model, with a memory of documents and of the conversation."""

from pathlib import Path
from typing import Annotated

import typer

from memdlm.cli import options


def chat(
    model: options.Model = ...,  # type: ignore[assignment]
    adapter: options.Adapter = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="off|on|DIR",
            help="on: write the conversation into a memory before every answer. DIR: begin with "
            "the memory kept there. /remember writes into it while you chat.",
        ),
    ] = "off",
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before the first turn.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Length of an answer.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of sampling, memory or objective, e.g. sampling.temperature=1.",
        ),
    ] = None,
    chat_template: Annotated[
        str, typer.Option(help="auto, or never to join the turns as plain text.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of memory and sampling.")] = 0,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
) -> None:
    """Chat with a model; on a terminal answers are seen as they denoise.

    Standard input that is no terminal is answered line by line. Exits with 1 if a line was not.
    """
    from memdlm.cli.libraries import prepare_libraries
    from memdlm.errors import UsageError

    if memory not in ("on", "off") and not Path(memory).is_dir():
        raise UsageError(f"--memory {memory}: write on, off, or the folder of a kept memory")
    prepare_libraries()

    from memdlm.cli.chat_run import run_chat
    from memdlm.cli.generation_run import GenerationRequest

    request = GenerationRequest(
        prompts=[],
        model=model,
        adapter=adapter,
        memory=memory,
        max_new_tokens=max_new_tokens,
        assignments=tuple(assignments or ()),
        chat_template=chat_template,
        seed=seed,
        batch_size=1,
        dtype=dtype,
        quantization=quantization,
    )
    if not run_chat(request, system):
        raise typer.Exit(1)
