"""The folder of one training run: made whole or not at all, never overwritten by accident.

recipe.yaml      the resolved recipe; marks the folder as a run
versions.json    what it was run with: packages, devices, the working directory's git commit
data.json        hashes of the data
resumes.jsonl    one line per --resume: from which step, and what --force let pass
metrics.jsonl    one line per log
tracking/        what tensorboard, trackio and wandb have kept, where the recipe asks for them
base/            the untrained network, where a tiny one carries an adapter
checkpoints/     what --resume continues from (see memdlm.training.checkpoints)
model/           final model and tokenizer, official layout; or
adapter/         final PEFT adapter and tokenizer
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdlm.cli.settings import read_yaml
from memdlm.errors import CheckpointError, UsageError
from memdlm.files import sync, sync_tree

if TYPE_CHECKING:
    from memdlm.training.checkpoints import CheckpointFolder

RECIPE = "recipe.yaml"
VERSIONS = "versions.json"
DATA = "data.json"
RESUMES = "resumes.jsonl"
METRICS = "metrics.jsonl"
TRACKING = "tracking"
BASE = "base"
CHECKPOINTS = "checkpoints"
RESULTS = ("model", "adapter")


class RunFolder:
    """One run's folder at `path`, which may not exist yet."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        """Name the folder; nothing is touched.

        Args:
            path: Where it is or will be.
            writes: Whether this process writes there, which one of several does. In the others
                nothing here changes the disk, and folders that are given do not exist.
        """
        self.path = path
        self.writes = writes

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / RECIPE).is_file()

    def recorded_recipe(self) -> dict[str, Any]:
        """Return the resolved recipe of the run in this folder."""
        return read_yaml(self.path / RECIPE)

    def recorded_data(self) -> dict[str, str]:
        """Return the data hashes of the run in this folder (see `memdlm.cli.data_hashes`).

        Raises:
            CheckpointError: The file cannot be read.
        """
        return self._recorded(DATA, "delete it to go on without comparing the data")

    def recorded_versions(self) -> dict[str, str]:
        """Return what the run in this folder was started with (see `memdlm.versions`).

        Raises:
            CheckpointError: The file cannot be read.
        """
        return self._recorded(VERSIONS, "delete it to go on without it")

    def _recorded(self, name: str, fix: str) -> dict[str, str]:
        path = self.path / name
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(recorded, dict):
                raise ValueError("it is no mapping")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {fix}") from error
        return recorded

    def note_resume(self, checkpoint: Path | None, changed: list[str]) -> None:
        """Append to the list of resumes; `changed` is what differs from the run so far."""
        if not self.writes:
            return
        record = {"from": None if checkpoint is None else checkpoint.name, "changed": changed}
        with (self.path / RESUMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
        if not self.writes:
            yield self.path
            return
        place = self.path.resolve()  # beside the folder itself, where the name is a link to it
        staging = place.with_name(f".{place.name}.partial-{os.getpid()}")
        missing = [parent for parent in place.parents if not parent.exists()]
        try:
            staging.mkdir(parents=True)
            yield staging
            sync_tree(staging)
            _replace(place, staging)
            sync(place.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise

    def latest_checkpoint(self, say: Callable[[str], None] = lambda line: None) -> Path | None:
        """Return the newest whole checkpoint, None if there is none; `say` is told of others."""
        return self._checkpoints().newest(say)

    def remove_partial(self) -> None:
        """Remove what a failed write left behind: checkpoints and results that are not whole."""
        if not self.writes:
            return
        self._checkpoints().tidy()
        for path in self.path.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoints(self) -> "CheckpointFolder":
        from memdlm.training.checkpoints import CheckpointFolder  # with it come the Trainer's

        return CheckpointFolder(self.path / CHECKPOINTS)

    @contextmanager
    def writing_result(self, name: str) -> Iterator[Path]:
        """Give a folder that becomes `name` (one of `RESULTS`) when the block ends well."""
        staging = self.path / f".{name}.partial"
        if not self.writes:
            yield staging
            return
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            yield staging
            sync_tree(staging)
            staging.rename(self.path / name)
            sync(self.path)
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
