"""The folder an evaluation leaves: what was compared, and one file for every arm, task and seed.

evaluation.json                       arms, tasks, groups, seeds
versions.json                         packages and devices
results/<arm>/<task>/seed<n>.json     a cell: settings, provenance, metrics, every sample
responses/                            the response cache
timings.jsonl                         seconds, which no cell holds: a cell is the same bytes
                                      whether or not its run was killed and started again

A cell is never mixed with one of other settings: what decides its numbers is written in it and
compared before anything is kept.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.errors import CheckpointError, UsageError
from memdlm.files import write_text
from memdlm.plain import as_json_gives_it, differences

FORMAT = 1
EVALUATION = "evaluation.json"
VERSIONS = "versions.json"
RESULTS = "results"
RESPONSES = "responses"
TIMINGS = "timings.jsonl"
_LOCK = ".lock"


@dataclass(frozen=True)
class CellKey:
    """Where a cell belongs."""

    arm: str
    task: str
    seed: int

    def __str__(self) -> str:
        """Return what messages call the cell."""
        return f"{self.arm} on {self.task}, seed {self.seed}"


class EvaluationFolder:
    """One evaluation's folder at `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched."""
        self.path = path

    @property
    def responses(self) -> Path:
        """Folder of the response cache."""
        return self.path / RESPONSES

    def cell_path(self, key: CellKey) -> Path:
        """Return the file of a cell."""
        return self.path / RESULTS / key.arm / key.task / f"seed{key.seed}.json"

    def begin(self, description: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Write down what is evaluated, or check that the folder holds the same evaluation.

        Arms that had no model yet may get one, so that a comparison can grow; several processes may
        begin at once.

        Raises:
            UsageError: The folder holds another evaluation, or other files.
            CheckpointError: Its description cannot be read, or the folder cannot be made.
        """
        path = self.path / EVALUATION
        if self.holds_other_files:
            raise UsageError(f"{self.path} holds other files: choose another place with --output")
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / _LOCK):
            if not path.is_file():
                write_text(self.path / VERSIONS, json.dumps(versions, indent=2) + "\n")
                write_text(path, _dump(description))
                return
            found = _read(path)
            wanted = as_json_gives_it(description)
            merged = _merged(found, wanted)
            if merged is None:
                names = dict.fromkeys([*found, *description])
                differing = [
                    name
                    for name in names
                    if name != "command" and found.get(name) != wanted.get(name)
                ]
                raise UsageError(
                    f"{self.path} holds an evaluation with other {', '.join(differing)}: results "
                    "are never mixed; choose another --output, or --overwrite it"
                )
            if merged != found:
                write_text(path, _dump(merged))

    @property
    def has_begun(self) -> bool:
        """Whether `begin` has written down here what is evaluated."""
        return (self.path / EVALUATION).is_file()

    @property
    def holds_other_files(self) -> bool:
        """Whether something is at this place that is no evaluation, finished or just beginning."""
        if not self.path.is_dir():
            return self.path.exists()
        if self.has_begun:
            return False
        # Another process may be beginning the same evaluation at this moment.
        ours = (_LOCK, VERSIONS, EVALUATION)
        return not all(
            any(entry.name.startswith((name, f".{name}")) for name in ours)
            for entry in self.path.iterdir()
        )

    def read(self, key: CellKey, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a finished cell, None if there is none.

        Raises:
            UsageError: The cell was made with other settings.
            CheckpointError: Its file cannot be read.
        """
        path = self.cell_path(key)
        if not path.is_file():
            return None
        cell = _read(path)
        differing = differences(cell.get("settings"), as_json_gives_it(settings))
        if differing:
            raise UsageError(
                f"{path} was made with other settings ({'; '.join(differing[:3])}): results are "
                "never mixed; choose another --output, or delete that file"
            )
        return cell

    def write(self, key: CellKey, cell: Mapping[str, Any]) -> None:
        """Write a cell; after a crash its file is whole or not there."""
        path = self.cell_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT, "arm": key.arm, "task": key.task, "seed": key.seed, **cell}
        write_text(path, _dump(record))

    def note_time(self, record: Mapping[str, Any]) -> None:
        """Append a line about seconds."""
        with (self.path / TIMINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _merged(found: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description of both evaluations, None if they are not one."""
    for name in dict.fromkeys([*found, *new]):
        if name not in ("command", "arms") and found.get(name) != new.get(name):
            return None
    arms, others = found.get("arms", []), new.get("arms", [])
    if [arm["name"] for arm in arms] != [arm["name"] for arm in others]:
        return None
    kept = []
    for old, other in zip(arms, others, strict=True):
        if old["model"] is not None and other["model"] is not None and old != other:
            return None
        kept.append(old if other["model"] is None else other)
    return {**found, "arms": kept}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes of this machine out while the block runs."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("it is of another format")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): delete it to make it anew") from error
    return found
