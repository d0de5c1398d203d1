"""A folder of results: scores, exposure bias and retrieval probe, whichever of them it holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memdlm.reporting.blocks import Block, Part
from memdlm.reporting.evaluations import evaluation_part, file_prefix, main_table
from memdlm.reporting.measurements import MEASUREMENTS, Measurement
from memdlm.reporting.page import Cell
from memdlm.reporting.results import EVALUATION, Evaluation, read_evaluation


@dataclass(frozen=True)
class EvaluationResults:
    """What a folder of results holds.

    Attributes:
        name: What the report calls it.
        evaluation: Its scores; None where there is no evaluation.json.
        measurements: What else was measured.
    """

    name: str
    evaluation: Evaluation | None
    measurements: Sequence[Measurement]

    @property
    def title(self) -> str:
        """Its heading."""
        return self.name if self.evaluation is None else self.evaluation.heading

    def part(self) -> Part:
        """Return its part of a page, figures drawn."""
        prefix = file_prefix(self.name)
        blocks: list[Block] = []
        for found in self.measurements:
            blocks += found.blocks(prefix)
        if self.evaluation is None:
            return Part(self.title, blocks)
        return evaluation_part(self.evaluation, prefix, blocks)

    def main_tables(self) -> list[tuple[str, list[str], list[list[Cell]]]]:
        """Return title, header and rows of the tables to print."""
        tables = [(found.title, *found.main_table()) for found in self.measurements]
        if self.evaluation is None or (tables and not self.evaluation.results):
            return tables
        return [(self.title, *main_table(self.evaluation)), *tables]


def holds_results(folder: Path) -> bool:
    """Tell whether a folder has anything that this file can read."""
    return any((folder / name).is_file() for name in (EVALUATION, *MEASUREMENTS))


def read_results(folder: Path, name: str, remark: Callable[[str], None]) -> EvaluationResults:
    """Return what a folder of results holds.

    Args:
        folder: Where it is.
        name: What the report calls it.
        remark: Told about files that are left out.

    Raises:
        CheckpointError: A file is damaged.
    """
    is_evaluation = (folder / EVALUATION).is_file()
    return EvaluationResults(
        name,
        read_evaluation(folder, name, remark) if is_evaluation else None,
        [
            measurement.read(folder / file)
            for file, measurement in MEASUREMENTS.items()
            if (folder / file).is_file()
        ],
    )
