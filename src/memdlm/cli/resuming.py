"""Whether a run may be continued with this recipe and this data: refused, or forced."""

from collections.abc import Callable
from typing import Any

from memdlm.cli.data_hashes import changed_data
from memdlm.cli.recipe import build_recipe, resolved
from memdlm.cli.run_folder import RECIPE, RunFolder
from memdlm.errors import MemDLMError, UsageError
from memdlm.plain import differences

# What a checkpoint's tensors belong to: no other network or optimizer could take them.
_FIXED = ("model", "tiny", "quantization", "adapter", "dtype", "training.optim")


def compare_recipe(folder: RunFolder, plain: dict[str, Any], force: bool) -> list[str]:
    """Return one `key: old -> new` line per setting that the run was not started with.

    Args:
        folder: The run.
        plain: The resolved recipe to go on with.
        force: Whether such settings may pass.

    Raises:
        UsageError: There is no run, or such a setting may not pass.
    """
    if not folder.is_run:
        raise UsageError(f"{folder.path} holds no run to resume: leave out --resume to start one")
    changed = differences(_completed(folder.recorded_recipe()), plain)
    changed = [line for line in changed if not line.startswith("output_dir:")]
    fixed = [line for line in changed if _is_fixed(line.partition(":")[0])]
    if force and fixed:
        raise UsageError(
            f"{folder.path} was started with other settings ({'; '.join(fixed[:3])}) that its "
            "checkpoints cannot take, --force or not: start another run from its result"
        )
    if changed and not force:
        raise UsageError(
            f"{folder.path} was started with other settings ({'; '.join(changed[:3])}): resume "
            "with the recipe it was started with, go on regardless with --force, or choose another "
            "output_dir"
        )
    return changed


def _completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe with defaults for the keys that have come since it was written."""
    try:
        return resolved(build_recipe(recorded, RECIPE))
    except MemDLMError:
        return recorded  # of a version that knew other keys: the comparison names them


def compare_data(
    folder: RunFolder, hashes: dict[str, str], force: bool, say: Callable[[str], None]
) -> list[str]:
    """Return one line per source that is not what the run was started with.

    Raises:
        UsageError: There is one, and `force` is off.
    """
    recorded = folder.recorded_data()
    if not recorded:
        say(f"{folder.path} has no record of its data, so nothing is known of changes")
        return []
    changed = changed_data(recorded, hashes)
    if changed and not force:
        raise UsageError(
            f"{folder.path} was started with other data ({', '.join(changed)}: not the same bytes "
            "or rows): bring the old data back, or go on regardless with --force"
        )
    return [f"{name}: {recorded.get(name)} -> {hashes.get(name)}" for name in changed]


def _is_fixed(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _FIXED)
