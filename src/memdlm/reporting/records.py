"""JSON records that commands have left, read with care: what is missing or damaged is one line."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from memdlm.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A mapping of a file, with the words of an error about it.

    Attributes:
        path: The file.
        fix: What to do about it, the end of every message.
        values: What it holds, or a part of that.
        place: Which part, dotted; empty for all.
    """

    path: Path
    fix: str
    values: Mapping[str, Any]
    place: str = ""

    def get(self, key: str, kind: type[T] | tuple[type[T], ...]) -> T:
        """Return a value that has to be there and of this type.

        Raises:
            CheckpointError: It is not; the message names file and key.
        """
        value = self.values.get(key)
        is_flag = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or is_flag:
            raise self.error(f"{self._full(key)} is missing or of the wrong kind")
        return value

    def text(self, key: str) -> str | None:
        """Return a text that may be missing or null."""
        return None if self.values.get(key) is None else self.get(key, str)

    def number(self, key: str) -> float:
        """Return a finite number."""
        value = float(self.get(key, (int, float)))
        if not isfinite(value):
            raise self.error(f"{self._full(key)} is {value}, which is no result")
        return value

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers, infinite ones allowed."""
        values = self.get(key, list)
        if not all(_is_number(value) for value in values):
            raise self.error(f"{self._full(key)} holds what is no number")
        return [float(value) for value in values]

    def part(self, key: str) -> "Record":
        """Return a mapping within this one."""
        return Record(self.path, self.fix, self.get(key, dict), self._full(key))

    def parts(self, key: str) -> list["Record"]:
        """Return the mappings of a list within this one."""
        found = []
        for index, value in enumerate(self.get(key, list)):
            place = f"{self._full(key)}[{index}]"
            if not isinstance(value, dict):
                raise self.error(f"{place} is no mapping")
            found.append(Record(self.path, self.fix, value, place))
        return found

    def error(self, reason: str) -> CheckpointError:
        """Return an error about this file."""
        return CheckpointError(f"{self.path}: {reason}: {self.fix}")

    def _full(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def read_record(path: Path, fix: str) -> tuple[Record, str]:
    """Return a file's mapping, and the SHA-256 of its bytes in hex.

    Raises:
        CheckpointError: It cannot be read, is cut off, or is no mapping of format 1.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): {fix}") from error
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or cut off, no whole JSON: {fix}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no mapping: {fix}")
    if values.get("format") != 1:
        raise CheckpointError(f"{path} is of another format than 1: {fix}")
    return Record(path, fix, values), hashlib.sha256(content).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
