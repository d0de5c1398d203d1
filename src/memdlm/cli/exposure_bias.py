"""`memdlm exposure-bias`: how much models suffer from their own output, on the same masks."""

from pathlib import Path
from typing import Annotated

import typer

from memdlm.cli import options


def exposure_bias(
    arms: options.Arms = ...,  # type: ignore[assignment]
    data: options.Rows = None,
    tasks: options.GeneratedTasks = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="on|off|both",
            help="Write a memory from each prompt; both measures every model without and with one.",
        ),
    ] = "off",
    steps: Annotated[
        int, typer.Option("--steps", help="Denoising steps; one per token of shorter responses.")
    ] = 48,
    response_length: Annotated[
        int | None,
        typer.Option(help="Cut longer responses to this many tokens. Default: the longest one."),
    ] = None,
    num_samples: options.NumSamples = None,
    seed: Annotated[
        int, typer.Option(help="Seed of orders, memories, resamples and generated rows.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples decoded together.")] = 16,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of memory or objective, e.g. memory.learning_rate=0.02.",
        ),
    ] = None,
    chat_template: Annotated[str, typer.Option(help="auto, or never for raw prompts.")] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results and the page.")
    ] = Path("runs/exposure_bias"),
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other settings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compare the likelihood of clean responses in clean and in the models' own context.

    All arms see the same samples, masks and orders of unmasking. Writes exposure_bias.json and
    exposure_bias.html; arms that were measured before with the same settings are kept.
    """
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.cli.exposure_bias_run import run_exposure_bias
    from memdlm.cli.measured_arms import read_measured_arms, sharing_settings
    from memdlm.evaluation.exposure_bias.comparison import BiasSettings
    from memdlm.evaluation.samples import read_samples

    source = "memdlm exposure-bias"
    chosen = read_measured_arms(
        arms, memory, sharing_settings(assignments, dtype, quantization, source), source
    )
    settings = BiasSettings(
        num_steps=steps,
        response_length=response_length,
        seed=seed,
        batch_size=batch_size,
        chat_template=chat_template,
    )
    samples = read_samples(data, tasks or [], num_samples, seed)
    run_exposure_bias(chosen, samples, settings, output, overwrite=overwrite, quiet=quiet)
