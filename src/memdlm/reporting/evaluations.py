"""The part of a page about one evaluation: what a reader has to know first, tables, figures, tests.

Every number of the paper that stands beside one of ours is printed there, not measured here.
"""

import re
from collections.abc import Sequence

from memdlm.reporting.blocks import Block, Fold, Grid, Heading, Paragraph, Part, Picture, Warnings
from memdlm.reporting.comparisons import HEADER, Comparison, compare_all
from memdlm.reporting.consistency import warnings
from memdlm.reporting.page import Cell
from memdlm.reporting.paper import paper_table, paper_tables
from memdlm.reporting.provenance import provenance_blocks
from memdlm.reporting.results import ComparedArm, Evaluation
from memdlm.reporting.score_figures import ALTERNATIVES, score_figures
from memdlm.reporting.scores import Column, columns, paper_figure, table_rows

# So many columns of scores, and of short tests, fit a page.
_COLUMNS_OF_A_TABLE = 9
_TESTS_IN_SIGHT = 12
_ARMS_IN_SIGHT = 4

_SCORES_NOTE = (
    "Scores in percent. ± is one standard error: over the n samples where a cell names no seeds, "
    "else over the means of its seeds. A group's score is the mean of its tasks' scores, each "
    "counting the same, and its n counts the samples of all of them. Samples that all score the "
    "same have an error of 0, which is no certainty."
)
_PAPER_NOTE = "Below the paper's figure stands ours minus the paper's, in percentage points."
_TESTS_NOTE = (
    "Differences in percentage points, on the samples that both arms were asked. The interval is "
    "the paired bootstrap's. Right and wrong answers get the exact sign test (McNemar), graded "
    "scores the sign-flip permutation test. p values are two-sided and are not corrected for the "
    "number of comparisons: of twenty between equal arms, one on average is below 0.05."
)


def main_table(evaluation: Evaluation) -> tuple[list[str], list[list[Cell]]]:
    """Return header and rows of the main table, its longer side down, fit for a terminal."""
    header, rows = table_rows(evaluation, columns(evaluation))
    if len(header) - 1 <= len(rows):
        return header, rows
    turned = [list(cells) for cells in zip(*rows, strict=True)]
    labels = [arm.label for arm in evaluation.arms]
    return ["task", *labels], [[n, *c] for n, c in zip(header[1:], turned[1:], strict=True)]


def evaluation_part(evaluation: Evaluation, prefix: str, more: Sequence[Block] = ()) -> Part:
    """Return the part of a page about an evaluation.

    Args:
        evaluation: What was read.
        prefix: Begins the names of its figures.
        more: What its folder holds besides scores.
    """
    blocks = [*_opening(evaluation), *_arms(evaluation)]
    if evaluation.results or not more:
        blocks += [*_scores(evaluation, prefix), *_tests(evaluation)]
    blocks += [*more, *_paper(evaluation), *provenance_blocks(evaluation)]
    return Part(evaluation.heading, blocks)


def file_prefix(name: str) -> str:
    """Return what the figures of an evaluation begin with, fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") + "_"


def _opening(evaluation: Evaluation) -> list[Block]:
    of = f"preset {evaluation.preset}, " if evaluation.preset else ""
    blocks: list[Block] = []
    if evaluation.command:
        blocks.append(Paragraph(f"{of}folder {evaluation.name}, made by: {evaluation.command}"))
    found = warnings(evaluation)
    if found:
        blocks.append(Warnings("Before you compare these numbers:", found))
    return blocks


def _arms(evaluation: Evaluation) -> list[Block]:
    rows = [[arm.label, arm.name, *_model(arm)] for arm in evaluation.arms]
    grid = Grid(["arm", "name", "model", "adapter", "memory"], rows, kind="texts")
    if len(rows) <= _ARMS_IN_SIGHT:
        return [grid]
    return [Fold(f"The {len(rows)} arms: models, adapters, memories", [grid])]


def _model(arm: ComparedArm) -> list[str]:
    memory = "from each prompt" if arm.has_memory else "none"
    return [arm.model or "no model yet", arm.adapter or "none", memory]


def _scores(evaluation: Evaluation, prefix: str) -> list[Block]:
    shown = columns(evaluation)
    blocks: list[Block] = [Heading("Scores"), *_tables(evaluation, shown)]
    notes = [_SCORES_NOTE]
    found = [
        figure
        for arm in evaluation.arms
        for column in shown
        if (figure := paper_figure(evaluation, arm, column.name)) is not None
    ]
    if found:
        backbones = sorted({figure.backbone for figure in found if figure.backbone})
        on = f" The paper measured on {' and '.join(backbones)}." if backbones else ""
        if any(figure.low != figure.high for figure in found):
            on += " Where it prints a range only, the difference is that from the nearer end."
        notes.append(f"{_PAPER_NOTE}{on} Source: {paper_tables()['source']}.")
    elif evaluation.preset:
        notes.append("The paper has no figures for these columns.")
    blocks += [Paragraph(note, "note") for note in notes]
    for name, png in score_figures(evaluation, shown).items():
        blocks.append(Picture(f"{prefix}{name}", png, ALTERNATIVES[name]))
    return [*blocks, *_members(evaluation, shown), *_other_metrics(evaluation, shown)]


def _tables(
    evaluation: Evaluation, shown: Sequence[Column], metric: str | None = None
) -> list[Block]:
    """Return tables of as many columns as fit."""
    return cut_tables(*table_rows(evaluation, shown, metric))


def cut_tables(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[Block]:
    """Return the tables that a wide one is cut into, each with about as many columns."""
    num_tables = max(1, -(-(len(header) - 1) // _COLUMNS_OF_A_TABLE))
    width = -(-(len(header) - 1) // num_tables)
    return [
        Grid(
            [header[0], *header[start : start + width]],
            [[row[0], *row[start : start + width]] for row in rows],
            kind="scores",
        )
        for start in range(1, len(header), width)
    ]


def _members(evaluation: Evaluation, shown: Sequence[Column]) -> list[Block]:
    """Return the tasks of each group, folded."""
    return [
        Fold(
            f"The tasks of {column.name}",
            _tables(evaluation, [Column(task, (task,)) for task in column.tasks]),
        )
        for column in shown
        if len(column.tasks) > 1
    ]


def _other_metrics(evaluation: Evaluation, shown: Sequence[Column]) -> list[Block]:
    """Return the same table in each further metric that tasks have, folded."""
    of_task: dict[str, set[str]] = {}
    for (_, task, _), result in evaluation.results.items():
        for metric in result.metrics[1:]:
            of_task.setdefault(metric, set()).add(task)
    blocks: list[Block] = []
    for metric, tasks in of_task.items():
        having = [column for column in shown if set(column.tasks) <= tasks]
        if having:
            blocks.append(Fold(f"Scores in the metric {metric}",
                               _tables(evaluation, having, metric)))  # fmt: skip
    return blocks


def _tests(evaluation: Evaluation) -> list[Block]:
    if len(evaluation.arms) < 2 or not evaluation.results:
        return []
    tests = compare_all(evaluation, columns(evaluation))
    parts: list[Block] = [_test_table(tests), Paragraph(_TESTS_NOTE, "note")]
    if len(tests) > _TESTS_IN_SIGHT:
        parts = [Fold(f"{len(tests)} comparisons of two arms on the same samples", parts)]
    return [Heading("Paired tests"), *parts]


def _test_table(tests: Sequence[Comparison]) -> Grid:
    return Grid(HEADER, [test.cells() for test in tests], kind="tests")


def _paper(evaluation: Evaluation) -> list[Block]:
    """Return the paper's own table, folded."""
    table = paper_table(evaluation.preset)
    if table is None:
        return []
    source = Paragraph(f"Source: {paper_tables()['source']}.", "note")
    return [Fold("The paper's own table", [*cut_tables(*table), source])]
