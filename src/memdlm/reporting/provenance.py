"""Where every number comes from: command, commit, versions, settings and the hash of its file."""

from collections.abc import Mapping, Sequence

from memdlm.reporting.blocks import Block, Fold, Grid, Heading, Paragraph
from memdlm.reporting.consistency import arm_differences, common_settings, task_differences
from memdlm.reporting.results import Evaluation, Result


def provenance_blocks(evaluation: Evaluation) -> list[Block]:
    """Return the settings in which arms differ, then all else, folded."""
    results = list(evaluation.results.values())
    if not results:
        return []
    differing = arm_differences(evaluation)
    labels = [arm.label for arm in evaluation.arms]
    blocks: list[Block] = [Heading("Settings in which the arms differ")]
    if differing:
        rows = [[name, *values] for name, values in differing.items()]
        blocks += _cut(["setting", *labels], rows)
    else:
        blocks.append(Paragraph("None: the arms differ in nothing that a result says of itself."))
    blocks.append(
        Fold(f"Where the numbers come from: {len(results):,} result files", _details(evaluation))
    )
    return blocks


def _cut(header: list[str], rows: Sequence[Sequence[str]], width: int = 6) -> list[Block]:
    """Return tables of so many columns at most, each with the first column."""
    return [
        Grid(
            [header[0], *header[start : start + width]],
            [[row[0], *row[start : start + width]] for row in rows],
            is_text=True,
        )
        for start in range(1, len(header), width)
    ]


def _details(evaluation: Evaluation) -> list[Block]:
    results = list(evaluation.results.values())
    commands = _numbered("C", [result.command for result in results])
    versions = _numbered("V", [_versions(result.versions) for result in results])
    blocks: list[Block] = [
        Heading("Result files", 4),
        Grid(
            ["file", "samples", "model", "commit", "command", "versions", "SHA-256 of the file"],
            [_row(result, commands, versions) for result in results],
            is_text=True,
        ),
        Heading("Commands", 4),
        Grid(["", "command"], [[n, text] for text, n in commands.items()], is_text=True),
        Heading("Versions", 4),
        Grid(["", "versions"], [[n, text] for text, n in versions.items()], is_text=True),
        Heading("Settings that all results share", 4),
        Grid(["setting", "value"], list(map(list, common_settings(evaluation).items())), (), True),
    ]
    by_task = task_differences(evaluation)
    if by_task:
        blocks += [
            Heading("Settings that differ between tasks or seeds", 4),
            Grid(
                ["setting", "value", "tasks"],
                [[name, *pair] for name, pairs in by_task.items() for pair in pairs],
                is_text=True,
            ),
        ]
    return blocks


def _row(result: Result, commands: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    return [
        result.path,
        f"{len(result.samples):,}",
        result.model,
        result.commit,
        commands[result.command],
        versions[_versions(result.versions)],
        result.digest,
    ]


def _numbered(letter: str, texts: Sequence[str]) -> dict[str, str]:
    """Return text -> a short name, in order of appearance."""
    return {text: f"{letter}{n}" for n, text in enumerate(dict.fromkeys(texts), start=1)}


def _versions(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
