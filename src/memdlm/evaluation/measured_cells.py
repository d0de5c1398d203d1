"""One arm's measurement in a file, with what decides its numbers; other settings are never mixed.

For measurements that go arm by arm (exposure bias, the retrieval probe). A run that was killed
keeps the arms it has finished.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdlm.errors import CheckpointError, UsageError
from memdlm.files import write_text
from memdlm.plain import as_json_gives_it, differences

FORMAT = 1


def read_cell(
    path: Path, settings: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any] | None:
    """Return what was measured with these settings; None where there is none, or one to replace.

    Raises:
        UsageError: The cell has other settings and `overwrite` is off.
        CheckpointError: It cannot be read and `overwrite` is off.
    """
    if not path.is_file():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["format"] != FORMAT:
            raise ValueError("it is of another format")
        differing = differences(cell["settings"], as_json_gives_it(settings))
        measured: dict[str, Any] = dict(cell["measured"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if overwrite:
            return None
        raise CheckpointError(
            f"cannot read {path} ({' '.join(str(error).split())}): delete it to measure it anew"
        ) from error
    if not differing:
        return measured
    if overwrite:
        return None
    raise UsageError(
        f"{path} was measured with other settings ({'; '.join(differing[:3])}): replace it with "
        "--overwrite, or choose another --output"
    )


def write_cell(path: Path, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Keep a measurement; after a crash its file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = {"format": FORMAT, "settings": as_json_gives_it(settings), "measured": measured}
    write_text(path, json.dumps(cell, ensure_ascii=False) + "\n")
