"""Evaluations of one sweep whose models were trained with different seeds: what remains over them.

A standard error over samples says how another set of questions would turn out; it says nothing of
another training, which moves a score of a small network by points. Here each training is one value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memdlm.reporting.blocks import Paragraph, Part
from memdlm.reporting.evaluations import cut_tables
from memdlm.reporting.page import Cell
from memdlm.reporting.results import ComparedArm, Evaluation
from memdlm.reporting.scores import NOT_RUN, Column, columns, paper_figure, score
from memdlm.uncertainty import mean_and_standard_error

_NOTE = (
    "Each training is one value: the score, in percent, that its models reached in an evaluation "
    "below. ± is one standard error over trainings, which differ in the seed of data order, masks "
    "and whatever else training draws. 'vs first' is the difference to {first}, taken between "
    "models of the same seed. With three trainings a 95 % interval reaches 4.3 standard errors to "
    "both sides."
)


@dataclass(frozen=True)
class RepeatedTrainings:
    """Evaluations that differ in the training seed alone, in the order of their seeds."""

    evaluations: Sequence[Evaluation]

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.evaluations[0].title}: {len(self.evaluations)} trainings"

    @property
    def arms(self) -> Sequence[ComparedArm]:
        """The arms that all have."""
        return self.evaluations[0].arms

    def table(self) -> tuple[list[str], list[list[Cell]]]:
        """Return header and rows, an arm a row."""
        shown = columns(self.evaluations[0])
        rows: list[list[Cell]] = [
            [arm.label, *(self._cell(arm, column) for column in shown)] for arm in self.arms
        ]
        return ["arm", *(column.name for column in shown)], rows

    def part(self) -> Part:
        """Return its part of a page."""
        note = _NOTE.format(first=self.arms[0].label)
        seeds = ", ".join(str(evaluation.training_seed) for evaluation in self.evaluations)
        opening = Paragraph(f"Training seeds {seeds}.")
        return Part(self.title, [opening, *cut_tables(*self.table()), Paragraph(note, "note")])

    def _cell(self, arm: ComparedArm, column: Column) -> tuple[str, ...]:
        reached, firsts = self._scores(arm, column), self._scores(self.arms[0], column)
        if not reached:
            return (NOT_RUN,)
        lines = [_text(list(reached.values())), f"{len(reached)} trainings"]
        if len(reached) < len(self.evaluations):
            lines[1] = f"{len(reached)} of {len(self.evaluations)} trainings"
        both = [reached[seed] - firsts[seed] for seed in reached if seed in firsts]
        if arm.name != self.arms[0].name and both:
            lines.append(f"vs first {_text(both, '+')}")
        paper = paper_figure(self.evaluations[0], arm, column.name)
        return (*lines, f"paper {paper.text}") if paper is not None else tuple(lines)

    def _scores(self, arm: ComparedArm, column: Column) -> dict[int | None, float]:
        """Return training seed -> score in percent, of the evaluations that are whole."""
        found = {e.training_seed: score(e, arm, column) for e in self.evaluations}
        return {
            seed: one.percent
            for seed, one in found.items()
            if one.is_whole and one.percent is not None
        }


def _text(values: Sequence[float], sign: str = "") -> str:
    estimate = mean_and_standard_error(values)
    error = estimate.standard_error
    return f"{estimate.mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def repeated_trainings(evaluations: Sequence[Evaluation]) -> list[RepeatedTrainings]:
    """Return the groups of evaluations that differ in the training seed alone.

    Evaluations without a training seed, and a second one of the same seed, are in none.
    """
    groups: dict[object, dict[int, Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.training_seed is not None:
            asked = (*evaluation.tasks, *evaluation.seeds, *evaluation.num_samples.items())
            arms = tuple((arm.name, arm.label) for arm in evaluation.arms)
            key = (evaluation.preset, evaluation.title, asked, arms)
            groups.setdefault(key, {}).setdefault(evaluation.training_seed, evaluation)
    return [
        RepeatedTrainings([group[seed] for seed in sorted(group)])
        for group in groups.values()
        if len(group) > 1
    ]
