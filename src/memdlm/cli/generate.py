"""`memdlm generate`: answer prompts, each with a memory of its own or without one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memdlm.cli import options

if TYPE_CHECKING:
    from memdlm.data.formatting import Message


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; standard input if neither this nor --file.")
    ] = None,
    model: options.Model = ...,  # type: ignore[assignment]
    adapter: options.Adapter = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            help="A text file is one prompt; in .jsonl, .json and .parquet each row's `prompt` is.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="on|off|DIR",
            help="Write a memory from each prompt, or answer all with the one kept in DIR (see "
            "`memdlm memory`). Default: as the run was trained; on without a run folder.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Length of the answer.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End an answer before this text, as an end-of-text token does; may be repeated.",
        ),
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
        str, typer.Option(help="auto, or never for raw prompts as the paper evaluates.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of memory and sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    max_memory_bytes: Annotated[
        int | None,
        typer.Option(help="Most that the memories of one batch may take; batches shrink to it."),
    ] = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON object per prompt and line, with tokens per step and seconds."
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Print text as soon as it is final; prompts are answered one by one."
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write an HTML page that plays the unmasking."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --trace replace a file.")
    ] = False,
) -> None:
    """Answer a prompt, many prompts, or standard input."""
    from memdlm.cli.libraries import prepare_libraries
    from memdlm.errors import UsageError

    if stream and as_json:
        raise UsageError("--stream prints text as it comes: leave out --json, or --stream")
    if not all(stop or ()):
        raise UsageError("--stop: the text is empty; give at least one character")
    if overwrite and trace is None:
        raise UsageError("--overwrite is for --trace: name its file, or leave it out")
    if trace is not None:
        from memdlm.cli.trace import check_free

        check_free(trace, overwrite)

    if memory not in (None, "on", "off") and not Path(memory).is_dir():
        raise UsageError(f"--memory {memory}: write on, off, or the folder of a kept memory")
    prompts = read_prompts(prompt, file)
    prepare_libraries()

    from memdlm.cli.generation_run import GenerationRequest, Output, run_generation

    run_generation(
        GenerationRequest(
            prompts=prompts,
            model=model,
            adapter=adapter,
            memory=memory,
            max_new_tokens=max_new_tokens,
            assignments=tuple(assignments or ()),
            chat_template=chat_template,
            seed=seed,
            batch_size=batch_size,
            max_memory_bytes=max_memory_bytes,
            dtype=dtype,
            quantization=quantization,
            stop_strings=tuple(stop or ()),
        ),
        Output(as_json=as_json, stream=stream, trace=trace),
    )


def read_prompts(prompt: str | None, file: Path | None) -> "list[str | list[Message]]":
    """Return the prompts that the arguments or standard input give.

    Raises:
        UsageError: Both an argument and a file, or nothing at all.
        DataError: The file cannot be read or a row has no prompt.
    """
    import sys

    from memdlm.errors import UsageError

    if prompt is not None and file is not None:
        raise UsageError("give a prompt or --file, not both")
    if prompt is not None:
        return [prompt]
    if file is not None:
        return _read_file(file)
    if sys.stdin.isatty():
        raise UsageError('there is no prompt: write memdlm generate --model PATH "your prompt"')
    return [_read_standard_input().strip("\n")]


def _read_standard_input() -> str:
    import sys

    from memdlm.errors import DataError

    try:
        # Bytes, since what a text stream makes of bad ones depends on the locale.
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text (byte {error.start}): convert it first"
        ) from error


def _read_file(file: Path) -> "list[str | list[Message]]":
    from memdlm.data.readers import SUFFIXES, read_records
    from memdlm.errors import DataError

    if file.suffix.lower() not in SUFFIXES:
        try:
            return [file.read_text(encoding="utf-8").strip("\n")]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise DataError(f"cannot read {file} ({reason}): check the path") from error
    prompts: list[Any] = []
    for record in read_records(str(file)):
        value = record.values.get("prompt")
        if not isinstance(value, str | list):
            raise DataError(f"{record.where} has no `prompt` that is a text or a list of messages")
        prompts.append(value)
    return prompts
