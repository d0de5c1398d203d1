"""What a training run has left behind: its metrics, read with care, and figures from them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from memdlm.errors import CheckpointError


@dataclass(frozen=True)
class Run:
    """One run as a report sees it.

    Attributes:
        name: What the report calls it.
        settings: What it was trained by, nested as in a recipe.
        records: Its log lines in order, each with a `step`.
        is_complete: Whether its final model has been written.
    """

    name: str
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    is_complete: bool

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric, over the lines that have it."""
        found = [(record["step"], record[key]) for record in self.records if key in record]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """Return the last value of a metric; None if it was never logged."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def num_steps(self) -> int:
        """The last step that was logged."""
        return int(max(record["step"] for record in self.records))

    def tokens_per_second(self) -> float | None:
        """Return the median over the log lines, which a slow start does not move."""
        values = self.series("tokens_per_second")[1]
        return median(values) if values else None

    def seconds_per_step(self) -> float | None:
        """Return the median over the spans between a log line of training and the line before it.

        An evaluation writes a line of its own when it ends, so its time is in no span. Saving a
        checkpoint is. None where lines carry no `time`, as those of older runs.
        """
        spans = []
        for before, after in zip(self.records, self.records[1:], strict=False):
            steps = after["step"] - before["step"]
            if steps > 0 and "loss" in after and "time" in before and "time" in after:
                seconds = after["time"] - before["time"]
                if seconds >= 0:  # a clock may be set back
                    spans.append(seconds / steps)
        return median(spans) if spans else None


def read_metrics(path: Path, remark: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the log lines of a metrics file.

    A last line that was cut off while being written (the run was killed, or is writing it now) is
    left out, and `remark` is told.

    Raises:
        CheckpointError: The file is missing, unreadable, without a line of training, or a line is
            no log line; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, so nothing was logged yet: train it further, or "
            "leave it out"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CheckpointError(f"cannot read {path} ({reason}): leave the run out") from error
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):  # no newline ends it
            remark(f"{path}:{number} was cut off while being written and is left out")
        else:
            raise CheckpointError(
                f'{path}:{number} is no log line ({{"step": number, ...}}): delete that line'
            )
    if not any("loss" in record for record in records):
        raise CheckpointError(
            f"{path} holds no training loss yet: train at least training.logging_steps steps, or "
            "leave the run out"
        )
    return records


def _record(line: str) -> dict[str, Any] | None:
    """Return a log line, its texts left out; None if it is none."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not _is_number(values.get("step")):
        return None
    return {key: value for key, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
