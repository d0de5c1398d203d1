"""Trackers of a command-line run: present, kept in the run folder, and off the network.

transformers' callbacks for tensorboard, trackio and wandb take their places from the environment,
which is set for the time of the run. A variable that the user has set is left as it is.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from memdlm.errors import ConfigError

# Trackers of the extra `track`: those that keep what they get in a folder.
TRACKERS = ("tensorboard", "trackio", "wandb")


@contextmanager
def tracking(report_to: str | Iterable[str] | None, folder: Path) -> Iterator[None]:
    """Have trackers write below `folder` while the block runs.

    Args:
        report_to: The recipe's `training.report_to`.
        folder: An own folder in the run's; created when a tracker starts, not before.

    Raises:
        ConfigError: A tracker is not installed.
    """
    wanted = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in wanted:
        if name in TRACKERS and not _is_installed(name):
            raise ConfigError(
                f"training.report_to: {name} is not installed; install memdlm[track], or use none"
            )
    if set(wanted) <= {"none"}:
        yield
        return
    settings = _settings(folder.absolute())
    ours = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(ours)
    # Trackio announces itself on standard output, which is for the command's results.
    with redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            _finish(wanted)
            for key in ours:
                os.environ.pop(key, None)


def _is_installed(name: str) -> bool:
    found = find_spec(name)
    # A folder of that name in the working directory (wandb makes one) looks like a package.
    return found is not None and found.origin is not None


def _finish(wanted: Iterable[str]) -> None:
    """End what is still open: the evaluation after training opens trackers once more."""
    if "trackio" in wanted and "trackio" in sys.modules:
        trackio = sys.modules["trackio"]
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()
    if "wandb" in wanted and "wandb" in sys.modules:
        wandb = sys.modules["wandb"]
        if wandb.run is not None:
            wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _settings(folder: Path) -> Mapping[str, str]:
    return {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),  # it adds a folder wandb/ by itself
        "WANDB_PROJECT": "memdlm",
        # What is trained on may be private: sending it away takes a decision of the user's.
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
