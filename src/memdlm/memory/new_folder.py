"""A folder that appears whole or not at all, and never in place of another one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memdlm.errors import CheckpointError


@contextmanager
def new_folder(place: Path, what: str) -> Iterator[Path]:
    """Give a folder beside `place` that takes its name when the block ends well.

    Args:
        place: Where it goes; must not exist.
        what: What is written there, for messages.

    Raises:
        CheckpointError: `place` exists, or cannot be written; nothing is left behind.
    """
    if place.exists() or place.is_symlink():
        raise CheckpointError(
            f"{place} exists: choose another place for the {what}, or delete it first"
        )
    staging = place.with_name(f".{place.name}.partial-{os.getpid()}")
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(place)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"cannot write the {what} to {place} ({error.strerror or error}): free some space, "
                "or choose another place"
            ) from error
        raise
