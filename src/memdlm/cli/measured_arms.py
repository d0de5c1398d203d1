"""What `exposure-bias` and `probe` share: arms by name, provenance, tables, results on the disk."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memdlm.cli.evaluation_arms import ArmDefaults, ArmRequest, read_arms, resolve_arm
from memdlm.cli.invocation import command_line
from memdlm.cli.settings import apply_overrides, nearest
from memdlm.errors import CheckpointError, UsageError
from memdlm.evaluation.config import Arm
from memdlm.evaluation.loaded import check_arms
from memdlm.files import write_text
from memdlm.versions import collect_commit, collect_versions

MEMORIES = {"off": (False,), "on": (True,), "both": (False, True)}
WITH_MEMORY = "_memory"


def sharing_settings(
    assignments: Sequence[str] | None,
    dtype: str,
    quantization: str | None,
    source: str,
    sections: Sequence[str] = ("memory", "objective"),
) -> ArmDefaults:
    """Return what `--set` and the options say for all arms.

    Raises:
        UsageError: `--set` names another section than `sections`, or is no assignment.
    """
    data = apply_overrides({}, assignments or ())
    for name, section in data.items():
        if name not in sections:
            raise UsageError(f"{source}: unknown key {name}{nearest(name, sections)}")
        if not isinstance(section, dict):
            raise UsageError(f"{source}: {name} is {section!r}; it must be a section of keys")
    return ArmDefaults(**data, dtype=dtype, quantization=quantization)


def read_measured_arms(
    texts: Sequence[str], memory: str, defaults: ArmDefaults, source: str
) -> list[Arm]:
    """Return the arms of `--arm NAME=MODEL[,ADAPTER]`, each without a memory, with one, or both.

    With `both` the arm with a memory is called after the one without: `NAME_memory`.

    Raises:
        UsageError: A text or `memory` is not of its form, or two arms have one name.
        CheckpointError: A run has not finished.
    """
    if memory not in MEMORIES:
        raise UsageError(f"--memory {memory}: write on, off or both")
    arms = []
    for name, (model, adapter) in read_arms(texts).items():
        for has_memory in MEMORIES[memory]:
            is_second = memory == "both" and has_memory
            request = ArmRequest(
                name=f"{name}{WITH_MEMORY}" if is_second else name,
                label=f"{name} with memory" if is_second else name,
                model=model,
                adapter=adapter,
                memory=has_memory,
            )
            arms.append(resolve_arm(request, defaults, source))
    check_arms(arms)
    for arm in arms:
        if Path(arm.name).name != arm.name or arm.name.startswith("."):
            raise UsageError(f"--arm {arm.name}: the name is that of a file; use letters and _")
    return arms


def begin_results(output: Path, name: str, arms: Sequence[str], overwrite: bool) -> None:
    """Make the folder of the results; refuse to drop arms that its results have.

    Raises:
        UsageError: The results there have arms that are not measured now.
        CheckpointError: The folder cannot be written.
    """
    path = output / name
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {output} ({error.strerror}): choose another place with --output"
        ) from error
    if overwrite or not path.is_file():
        return
    try:
        found = [arm["name"] for arm in json.loads(path.read_text(encoding="utf-8"))["arms"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: delete it, or --overwrite it") from error
    missing = [name for name in found if name not in arms]
    if missing:
        raise UsageError(
            f"{path} has results of {', '.join(missing)}, which this command would drop: name "
            "those arms too, choose another --output, or --overwrite"
        )


def provenance() -> dict[str, Any]:
    """Return command, commit and versions, as results record them."""
    return {
        "command": command_line(),
        "commit": collect_commit(Path.cwd())["git_commit"],
        "versions": collect_versions(),
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write results; after a crash the file is whole or as it was."""
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def say_on_error(quiet: bool) -> Callable[[str], None]:
    """Return what says lines about the course on standard error, or nothing."""

    def say(line: str) -> None:
        if not quiet:
            print(f"memdlm: {line}", file=sys.stderr)

    return say


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int = 1) -> None:
    """Print a table on standard output; all but the first `num_labels` columns are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, cell in enumerate(header):
        table.add_column(cell, justify="left" if index < num_labels else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 130, markup=False).print(table)
