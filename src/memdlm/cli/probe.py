"""`memdlm probe`: what a memory still answers when the needle cannot be looked up."""

from pathlib import Path
from typing import Annotated

import typer

from memdlm.cli import options


def probe(
    arms: options.Arms = ...,  # type: ignore[assignment]
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Rows as for training, with `evidence` (texts of the prompt that the answer "
            "follows from), `question` (the prompt without its document) and, if need be, "
            "`answers`.",
        ),
    ] = None,
    tasks: options.GeneratedTasks = None,
    conditions: Annotated[
        list[str] | None,
        typer.Option(
            "--condition",
            metavar="NAME",
            help="normal, answer_blocked (the answer cannot look at the evidence), all_blocked "
            "(nothing can) or question_only. Repeat it. Default: all four.",
        ),
    ] = None,
    num_samples: options.NumSamples = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of answers. Default: that of the longest right one.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of memories, orders, resamples and generated rows.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions asked together.")] = 8,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of memory, objective or sampling, e.g. memory.rank=16.",
        ),
    ] = None,
    chat_template: Annotated[str, typer.Option(help="auto, or never for raw prompts.")] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results and the page.")
    ] = Path("runs/probe"),
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Ask the same questions with the attention to their evidence cut, and without the document.

    Every model answers without a memory and with one that was written from the whole prompt: what
    only the latter answers came from the weights. Writes probe.json and probe.html; arms that were
    measured before with the same settings are kept.
    """
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.cli.measured_arms import read_measured_arms, sharing_settings
    from memdlm.cli.probe_run import run_probe
    from memdlm.evaluation.retrieval_probe.asking import CONDITIONS
    from memdlm.evaluation.retrieval_probe.comparison import ProbeSettings
    from memdlm.evaluation.samples import read_samples

    source = "memdlm probe"
    sections = ("memory", "objective", "sampling")
    defaults = sharing_settings(assignments, dtype, quantization, source, sections)
    chosen = read_measured_arms(arms, "on", defaults, source)
    settings = ProbeSettings(
        conditions=tuple(conditions or CONDITIONS),
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        chat_template=chat_template,
    )
    samples = read_samples(data, tasks or [], num_samples, seed)
    run_probe(chosen, samples, settings, output, overwrite=overwrite, quiet=quiet)
