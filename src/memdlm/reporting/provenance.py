"""Where every number comes from: command, commit, versions, settings and the hash of its file."""

from collections.abc import Mapping, Sequence

from memdlm.reporting.blocks import Block, Fold, Grid, Heading, Paragraph
from memdlm.reporting.consistency import (
    arm_differences,
    common_settings,
    short_commit,
    task_differences,
)
from memdlm.reporting.results import Evaluation, Result

# So many columns of settings fit a page.
_ARMS_ACROSS = 4
_SETTINGS_ACROSS = 6


def provenance_blocks(evaluation: Evaluation) -> list[Block]:
    """Return the settings in which arms differ, then all else, folded."""
    results = list(evaluation.results.values())
    if not results:
        return []
    differing = arm_differences(evaluation)
    blocks: list[Block] = [Heading("Settings in which the arms differ")]
    if differing:
        labels = [arm.label for arm in evaluation.arms]
        blocks += _side_by_side(labels, differing)
    else:
        blocks.append(Paragraph("None: the arms differ in nothing that a result says of itself."))
    blocks.append(
        Fold(f"Where the numbers come from: {len(results):,} result files", _details(evaluation))
    )
    return blocks


def _side_by_side(labels: Sequence[str], settings: Mapping[str, Sequence[str]]) -> list[Block]:
    """Return the settings of a few arms down and the arms across; of many, the other way round."""
    if len(labels) <= _ARMS_ACROSS:
        rows = [[name, *values] for name, values in settings.items()]
        return [Grid(["setting", *labels], rows, kind="texts")]
    names = list(settings)
    blocks: list[Block] = []
    for start in range(0, len(names), _SETTINGS_ACROSS):
        shown = names[start : start + _SETTINGS_ACROSS]
        rows = [
            [label, *(settings[name][index] for name in shown)]
            for index, label in enumerate(labels)
        ]
        blocks.append(Grid(["arm", *shown], rows, kind="texts"))
    return blocks


def _details(evaluation: Evaluation) -> list[Block]:
    results = list(evaluation.results.values())
    origins: dict[tuple[str, ...], str] = {}
    for result in results:
        origins.setdefault(_origin(result), f"O{len(origins) + 1}")
    blocks: list[Block] = [
        Heading("Result files", 4),
        Grid(
            ["file", "samples", "commit", "origin", "SHA-256 of the file"],
            [_row(result, origins) for result in results],
            kind="texts",
        ),
        Heading("Origins", 4),
        Grid(
            ["", "command", "commit", "model and adapter", "versions"],
            [[name, *origin] for origin, name in origins.items()],
            kind="texts",
        ),
        Heading("Settings that all results share", 4),
        Grid(
            ["setting", "value"],
            [[name, value] for name, value in common_settings(evaluation).items()],
            kind="texts",
        ),
    ]
    by_task = task_differences(evaluation)
    if by_task:
        blocks += [
            Heading("Settings that differ between tasks or seeds", 4),
            Grid(
                ["setting", "value", "tasks"],
                [[name, *pair] for name, pairs in by_task.items() for pair in pairs],
                kind="texts",
            ),
        ]
    return blocks


def _row(result: Result, origins: Mapping[tuple[str, ...], str]) -> list[str]:
    name, count = result.path, f"{len(result.samples):,}"
    return [name, count, short_commit(result.commit), origins[_origin(result)], result.digest]


def _origin(result: Result) -> tuple[str, ...]:
    """Return command, commit, model and versions, which many results share."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return result.command, result.commit, result.model, versions
