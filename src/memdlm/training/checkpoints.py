"""A folder of checkpoints of which a whole one is always there, whenever the process dies.

A checkpoint is written in `_partial/`, sealed (see `memdlm.files`), and only then renamed to
`checkpoint-N`. Older ones go after the new one has its name, and by way of `_partial/` too, so that
a folder called `checkpoint-N` is never one that is half written or half removed.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memdlm.files import defect, seal, sync

# The underscore keeps it out of what the Trainer pushes to the hub.
_PARTIAL = "_partial"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointFolder:
    """The checkpoints in `path`, which may not exist yet."""

    def __init__(self, path: Path | str) -> None:
        """Name the folder; nothing is touched."""
        self.path = Path(path)

    def all(self) -> list[Path]:
        """Return every `checkpoint-N`, whole or not, by step."""
        found = [path for path in self.path.glob("checkpoint-*") if path.is_dir()]
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)

    def newest(self, say: Callable[[str], None] = lambda line: None) -> Path | None:
        """Return the whole checkpoint of the highest step; `say` is told of each one passed over.

        Reads every byte of what it returns.
        """
        for path in reversed(self.all()):
            reason = defect(path)
            if reason is None:
                return path
            say(f"skipped {path} because {reason}")
        return None

    @contextmanager
    def writing(
        self, step: int, *, commits: bool = True, wait: Callable[[], None] = lambda: None
    ) -> Iterator[Path]:
        """Give the folder to write `checkpoint-<step>` in, and publish that when the block ends.

        If the block fails, nothing but `_partial/` was touched.

        Args:
            step: Its number.
            commits: Whether this process publishes, which one of several does.
            wait: Returns when all processes have called it.
        """
        partial = self.path / _PARTIAL
        name = f"checkpoint-{step}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            wait()
            if commits:
                seal(partial / name)
                self._publish(partial / name)
            wait()
        finally:
            if commits:
                shutil.rmtree(partial, ignore_errors=True)

    def tidy(self) -> None:
        """Clear away what a killed process left; publish what it had sealed but not yet named."""
        partial = self.path / _PARTIAL
        for path in partial.glob("checkpoint-*"):
            place = self.path / path.name
            if defect(path) is None and defect(place, read=False) is not None:
                self._publish(path)
        shutil.rmtree(partial, ignore_errors=True)

    def rotate(self, limit: int | None, keep: Iterable[Path | str] = ()) -> None:
        """Remove the oldest whole checkpoints until `limit` are left (None or 0: keep all).

        The newest whole one stays, and so do those in `keep`. What is not whole is not counted and
        not touched.
        """
        if not limit or limit < 0:
            return
        whole = [path for path in self.all() if defect(path, read=False) is None]
        kept = {Path(path).name for path in keep} | {path.name for path in whole[-1:]}
        surplus = len(whole) - limit
        for path in [path for path in whole if path.name not in kept][: max(surplus, 0)]:
            self._remove(path)

    def _publish(self, sealed: Path) -> None:
        place = self.path / sealed.name
        if place.exists():
            # Killed between the two renames, the run still has the sealed one; see `tidy`.
            self._remove(place, rename_only=True)
        sealed.rename(place)
        sync(self.path)
        sync(self.path.parent)

    def _remove(self, path: Path, rename_only: bool = False) -> None:
        grave = self.path / _PARTIAL / f"removed-{step_of(path)}"
        grave.parent.mkdir(exist_ok=True)
        shutil.rmtree(grave, ignore_errors=True)
        path.rename(grave)
        if not rename_only:
            shutil.rmtree(grave, ignore_errors=True)
            if not any(grave.parent.iterdir()):
                grave.parent.rmdir()


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])
