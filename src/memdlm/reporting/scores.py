"""Scores of an evaluation: which columns there are, and what each arm reached in them.

A column is a task, or a group of tasks whose means count the same. Scores are fractions here;
tables show percent. A column of which not everything was run says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memdlm.reporting.page import Cell
from memdlm.reporting.paper import PaperFigure, paper_figures
from memdlm.reporting.results import ComparedArm, Evaluation
from memdlm.uncertainty import Estimate, mean_and_standard_error, over_seeds, over_strata

NOT_RUN = "not run"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: A task or a group.
        tasks: The task itself, or the group's members.
    """

    name: str
    tasks: tuple[str, ...]

    @property
    def base(self) -> str:
        """The name without its length."""
        return self.name.partition("@")[0]

    @property
    def length(self) -> str:
        """The length as the name has it; empty if it has none."""
        return self.name.partition("@")[2]


@dataclass(frozen=True)
class Score:
    """What an arm reached in a column.

    Attributes:
        estimate: Mean and standard error, a fraction; None where it was not run, or where a group
            has no seed with all its tasks.
        num_run: Samples that were run, over tasks and seeds.
        num_expected: Samples that were asked for; None where nothing says so.
        is_whole: Whether all of it was run.
        paper: The paper's figure; None where it has none.
    """

    estimate: Estimate | None
    num_run: int
    num_expected: int | None
    is_whole: bool
    paper: PaperFigure | None

    @property
    def percent(self) -> float | None:
        """The mean in percent."""
        return None if self.estimate is None else 100 * self.estimate.mean

    @property
    def error_percent(self) -> float | None:
        """The standard error in percent."""
        error = None if self.estimate is None else self.estimate.standard_error
        return None if error is None else 100 * error

    def lines(self) -> tuple[str, ...]:
        """Return the cell: the score, what it rests on, and the paper's beside it."""
        lines = [self._score(), *self._basis()]
        if self.paper is not None:
            lines.append(f"paper {self.paper.text}")
            if self.percent is not None:
                lines.append(f"diff {self.paper.difference(self.percent):+.1f}")
        return tuple(lines)

    def _score(self) -> str:
        if self.percent is None:
            return "partly run" if self.num_run else NOT_RUN
        error = self.error_percent
        return f"{self.percent:.1f}" + ("" if error is None else f" ± {error:.1f}")

    def _basis(self) -> list[str]:
        if not self.num_run:
            return []
        if not self.is_whole:
            of = "" if self.num_expected is None else f" of {self.num_expected:,}"
            return [f"{self.num_run:,}{of} samples"]
        if self.estimate is not None and self.estimate.over == "seeds":
            return [f"n {self.num_run:,}, {self.estimate.num_seeds} seeds"]
        return [f"n {self.num_run:,}"]


def columns(evaluation: Evaluation) -> list[Column]:
    """Return the columns of the main table: groups in place of their tasks."""
    found: dict[str, Column] = {}
    for task in evaluation.tasks:
        names = [name for name, tasks in evaluation.groups.items() if task in tasks]
        for name in names or [task]:
            found[name] = Column(name, tuple(evaluation.groups.get(name, (task,))))
    return list(found.values())


def score(
    evaluation: Evaluation, arm: ComparedArm, column: Column, metric: str | None = None
) -> Score:
    """Return what an arm reached in a column; `metric` is another than the main one."""
    results = {
        (task, seed): evaluation.results[arm.name, task, seed]
        for task in column.tasks
        for seed in evaluation.seeds
        if (arm.name, task, seed) in evaluation.results
    }
    num_run = sum(len(result.samples) for result in results.values())
    wanted = [evaluation.expected_samples(task) for task in column.tasks]
    known = [count for count in wanted if count is not None]
    expected = sum(known) * len(evaluation.seeds) if len(known) == len(wanted) else None
    seeds = [
        over_strata(
            [mean_and_standard_error(results[task, seed].scores(metric)) for task in column.tasks]
        )
        for seed in evaluation.seeds
        if all((task, seed) in results for task in column.tasks)
    ]
    return Score(
        estimate=over_seeds(seeds) if seeds else None,
        num_run=num_run,
        num_expected=expected,
        is_whole=len(results) == len(column.tasks) * len(evaluation.seeds)
        and (expected is None or num_run >= expected),
        paper=paper_figure(evaluation, arm, column.name) if metric is None else None,
    )


def paper_figure(evaluation: Evaluation, arm: ComparedArm, column: str) -> PaperFigure | None:
    """Return the paper's figure beside an arm's: what the evaluation names, else the tables'."""
    named = evaluation.paper.get(arm.name, {}).get(column)
    if named is None:
        return paper_figures(evaluation.preset, arm.name, column, arm.model)
    # Of either backbone, for an evaluation may know better than its model's name which it is.
    for model in (arm.model, "LLaDA2"):
        figure = paper_figures(evaluation.preset, arm.name, column, model)
        if figure is not None and figure.low == figure.high == named:
            return figure
    return PaperFigure(named, named)


def table_rows(
    evaluation: Evaluation, shown: Sequence[Column], metric: str | None = None
) -> tuple[list[str], list[list[Cell]]]:
    """Return header and rows of a table of scores, an arm a row."""
    rows: list[list[Cell]] = [
        [arm.label, *(score(evaluation, arm, column, metric).lines() for column in shown)]
        for arm in evaluation.arms
    ]
    return ["arm", *(column.name for column in shown)], rows
