"""Where `memdlm eval` puts its results, and what may be there already. Loads no torch."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memdlm.errors import CheckpointError, UsageError
from memdlm.evaluation.harness.sharding import Shard
from memdlm.evaluation.records import EvaluationFolder


def evaluation_folder(
    output: Path | None, preset: str | None, tasks: Sequence[str]
) -> EvaluationFolder:
    """Return the folder of the results: `output`, or one named by what is asked."""
    if output is not None:
        return EvaluationFolder(output.expanduser())
    name = preset or "_".join(tasks).replace("@", "_")
    return EvaluationFolder(Path("runs/eval") / name)


def check_place(folder: EvaluationFolder, overwrite: bool, shard: Shard) -> None:
    """Refuse a place that holds something else, before time is spent.

    Raises:
        UsageError: It is a file, or a folder with other files than an evaluation's; or one of
            several processes is to delete what the others may have begun.
    """
    if overwrite and shard.count > 1 and folder.path.exists():
        raise UsageError(
            f"{folder.path}: one of several processes cannot know what the others have begun; "
            "use --processes, or delete the folder and leave out --overwrite"
        )
    if folder.holds_other_files:
        verb = "holds no evaluation" if overwrite else "holds other files"
        raise UsageError(f"{folder.path} {verb}: choose another place with --output")


@contextmanager
def moved_aside(folder: EvaluationFolder) -> Iterator[None]:
    """Take an evaluation away, for good if another one has begun in its place by the end.

    Raises:
        CheckpointError: It cannot be moved.
    """
    path = folder.path
    if not path.exists():
        yield
        return
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        kept = aside / "evaluation"
        try:
            path.rename(kept)
        except OSError:
            aside.rmdir()
            raise
    except OSError as error:
        raise CheckpointError(
            f"cannot overwrite {path} ({error.strerror}): choose another place with --output"
        ) from error
    try:
        yield
    finally:
        if not folder.has_begun:  # nothing came of it: wrong input, say
            shutil.rmtree(path, ignore_errors=True)
            kept.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
