"""The work of `memdlm exposure-bias`: measure, keep, draw, print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.cli.measured_arms import (
    begin_results,
    print_table,
    provenance,
    say_on_error,
    write_json,
)
from memdlm.evaluation.config import Arm
from memdlm.evaluation.exposure_bias.comparison import (
    RESULT,
    BiasSettings,
    compare_exposure_bias,
)
from memdlm.evaluation.samples import Sample
from memdlm.reporting.exposure_bias import exposure_bias_section, pair_rows, result_rows
from memdlm.reporting.page import Place

PAGE = "exposure_bias.html"


def run_exposure_bias(
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    settings: BiasSettings,
    output: Path,
    *,
    title: str = "Exposure bias",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the arms, write `exposure_bias.json` and the page into `output`, print the table.

    Args:
        arms: What is compared.
        samples: What it is measured on.
        settings: How.
        output: Folder; results of other settings in it are refused.
        title: Of the page.
        overwrite: Replace results of other settings.
        quiet: Say nothing of the course.

    Returns:
        What `exposure_bias.json` holds.

    Raises:
        UsageError: The folder holds results of other settings, or as `compare_exposure_bias`.
        DataError: A sample cannot be used.
        CheckpointError: A model cannot be read, or the folder not be written.
    """
    output = output.expanduser()
    begin_results(output, RESULT, [arm.name for arm in arms], overwrite)
    found = compare_exposure_bias(
        arms, samples, settings, output, overwrite=overwrite, say=say_on_error(quiet)
    )
    sources = list(dict.fromkeys(sample.source for sample in samples))
    result = {**found, "data": sources, **provenance()}
    write_json(output / RESULT, result)
    page = Place(output / PAGE).write(title, [exposure_bias_section(result)])
    print_table(*result_rows(result))
    if result["pairs"]:
        print_table(*pair_rows(result))
    print(f"open {page}")
    return result
