"""What reading any part of a checkpoint shares: does it exist, and what went wrong in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from memdlm.errors import CheckpointError

# What transformers, PEFT and safetensors raise on files that are missing, damaged or foreign.
_READING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    UserWarning,
    SafetensorError,
)


def check_exists(name: str) -> None:
    """Refuse what looks like a path and is no folder, before it is looked up on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{name} is a file: name the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CheckpointError(f"no model folder at {name or '(an empty path)'}: check the path")


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line; our own errors pass."""
    try:
        yield
    except _READING_ERRORS as error:
        where = "folder" if Path(name).is_dir() else "local folder or reachable hub model"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"cannot load the {what} from {name} ({reason[:300]}): check that it is a complete "
            f"{where}"
        ) from error
