"""The table of benchmark tasks, its groups, and the reading of names; a new task is one row."""

import difflib
from collections.abc import Sequence

from memdlm.errors import UsageError
from memdlm.evaluation.tasks.babilong import BABILONG
from memdlm.evaluation.tasks.generated import GENERATED
from memdlm.evaluation.tasks.longbench import LONGBENCH
from memdlm.evaluation.tasks.ruler import RULER
from memdlm.evaluation.tasks.task import BenchmarkTask, length_label, split_name

TASKS: dict[str, BenchmarkTask] = {
    **RULER,
    **BABILONG,
    **LONGBENCH,
    **GENERATED,
}

# A group stands for its members, each of the group's length.
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(RULER),
    "babilong": tuple(BABILONG),
    "longbench": tuple(LONGBENCH),
    "generated": tuple(GENERATED),
}

# What others call a task.
ALIASES: dict[str, str] = {"ruler_mv": "niah_multivalue"}


def find_task(name: str) -> tuple[BenchmarkTask, int | None]:
    """Return the row and the length of a task's name.

    Raises:
        UsageError: There is no such task (with the nearest name), or the length is missing, not
            wanted, or too short.
    """
    base, length = split_name(name)
    task = TASKS.get(ALIASES.get(base, base))
    if task is None:
        raise UsageError(f"there is no task {base!r}{_nearest(base)}")
    if task.has_length and length is None:
        raise UsageError(f"task {base} needs a length, as in {base}@4k")
    if not task.has_length and length is not None:
        raise UsageError(f"task {base} has no length of its own: write {base} without @")
    if task.shortest is not None and length is not None and length < task.shortest:
        raise UsageError(
            f"task {name}: the shortest length is {task.shortest} {task.unit}; write "
            f"{base}@{length_label(task.shortest)} or more"
        )
    return task, length


def expand(names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the tasks that names stand for, in order and once each, and the groups among them.

    Every name comes out in one spelling: `ruler_mv@4096` is `niah_multivalue@4k`.

    Raises:
        UsageError: As `find_task`.
    """
    tasks: dict[str, None] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        base, length = split_name(name)
        base = ALIASES.get(base, base)
        suffix = "" if length is None else f"@{length_label(length)}"
        members = [f"{member}{suffix}" for member in GROUPS.get(base, (base,))]
        for member in members:
            find_task(member)
            tasks[member] = None
        if base in GROUPS:
            groups[f"{base}{suffix}"] = members
    return list(tasks), groups


def _nearest(base: str) -> str:
    known = [*TASKS, *GROUPS, *ALIASES]
    close = difflib.get_close_matches(base, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
