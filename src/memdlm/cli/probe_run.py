"""The work of `memdlm probe`: ask, keep, draw, print."""

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
from memdlm.evaluation.retrieval_probe.comparison import RESULT, ProbeSettings, compare_retrieval
from memdlm.evaluation.samples import Sample
from memdlm.reporting.page import Place
from memdlm.reporting.retrieval_probe import effect_rows, result_rows, retrieval_probe_section

PAGE = "probe.html"


def run_probe(
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    settings: ProbeSettings,
    output: Path,
    *,
    title: str = "In-weight retrieval",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Ask the arms, write `probe.json` and the page into `output`, print the tables.

    Args:
        arms: What is compared; each is asked without and with its memory.
        samples: Questions with their evidence.
        settings: How to ask.
        output: Folder; results of other settings in it are refused.
        title: Of the page.
        overwrite: Replace results of other settings.
        quiet: Say nothing of the course.

    Returns:
        What `probe.json` holds.

    Raises:
        UsageError: The folder holds results of other settings, or as `compare_retrieval`.
        DataError: A sample cannot be used.
        CheckpointError: A model cannot be read, or the folder not be written.
    """
    output = output.expanduser()
    begin_results(output, RESULT, [arm.name for arm in arms], overwrite)
    found = compare_retrieval(
        arms, samples, settings, output, overwrite=overwrite, say=say_on_error(quiet)
    )
    sources = list(dict.fromkeys(sample.source for sample in samples))
    result = {**found, "data": sources, **provenance()}
    write_json(output / RESULT, result)
    page = Place(output / PAGE).write(title, [retrieval_probe_section(result)])
    print_table(*result_rows(result), num_labels=2)
    print_table(*effect_rows(result), num_labels=2)
    print(f"open {page}")
    return result
