"""The folder of one training run: made whole or not at all, never overwritten by accident.

recipe.yaml      the resolved recipe; marks the folder as a run
versions.json    what it was run with
metrics.jsonl    one line per log
base/            the untrained network, where a tiny one carries an adapter
checkpoints/     what --resume continues from
model/           final model and tokenizer, official layout; or
adapter/         final PEFT adapter and tokenizer
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdlm.cli.settings import read_yaml
from memdlm.errors import CheckpointError, UsageError

RECIPE = "recipe.yaml"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
BASE = "base"
CHECKPOINTS = "checkpoints"
RESULTS = ("model", "adapter")

# What the Trainer writes last into a checkpoint.
_LAST_FILE = "trainer_state.json"


class RunFolder:
    """One run's folder at `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched."""
        self.path = path

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / RECIPE).is_file()

    def recorded_recipe(self) -> dict[str, Any]:
        """Return the resolved recipe of the run in this folder."""
        return read_yaml(self.path / RECIPE)

    def result(self) -> Path | None:
        """Return the folder of the final model or adapter; None while there is none."""
        return next((self.path / name for name in RESULTS if (self.path / name).is_dir()), None)

    def check_free(self, overwrite: bool) -> None:
        """Make sure that a new run may be written here.

        Raises:
            UsageError: The folder holds another run and `overwrite` is off, or other files.
            CheckpointError: The place cannot be written to.
        """
        if self.is_run and not overwrite:
            raise UsageError(
                f"{self.path} already holds a run: continue it with --resume, replace it with "
                "--overwrite, or choose another place with --set output_dir=..."
            )
        if not self.is_run and self._holds_something():
            raise UsageError(
                f"{self.path} exists and is not a run folder: choose another place with "
                "--set output_dir=..."
            )
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"cannot write to {parent}: check its rights, or choose another place with "
                "--set output_dir=..."
            )

    def _holds_something(self) -> bool:
        if not self.path.exists():
            return False
        return not self.path.is_dir() or any(self.path.iterdir())

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Give a folder beside this one that takes its place when the block ends well.

        An old run is removed only then. If the block fails, nothing has changed.
        """
        place = self.path.resolve()  # beside the folder itself, where the name is a link to it
        staging = place.with_name(f".{place.name}.partial-{os.getpid()}")
        missing = [parent for parent in place.parents if not parent.exists()]
        try:
            staging.mkdir(parents=True)
            yield staging
            _replace(place, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise

    def latest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; None if there is none."""
        whole = [path for path in self._checkpoints() if (path / _LAST_FILE).is_file()]
        return max(whole, key=_step, default=None)

    def remove_partial(self) -> None:
        """Remove what a failed write left behind: checkpoints and results that are not whole."""
        for path in self._checkpoints():
            if not (path / _LAST_FILE).is_file():
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        found = (self.path / CHECKPOINTS).glob("checkpoint-*")
        return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdigit()]

    @contextmanager
    def writing_result(self, name: str) -> Iterator[Path]:
        """Give a folder that becomes `name` (one of `RESULTS`) when the block ends well."""
        staging = self.path / f".{name}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            yield staging
            staging.rename(self.path / name)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _replace(place: Path, staging: Path) -> None:
    """Put `staging` where `place` is or may be; on failure `place` is as before."""
    if not place.exists():
        staging.rename(place)
        return
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    place.rename(old)
    try:
        staging.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
